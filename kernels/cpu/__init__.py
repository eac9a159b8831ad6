"""The ops on CPU tensors: the common ones in C, where it was compiled, the others as `kernels.reference` has them."""
