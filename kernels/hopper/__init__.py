"""Hopper's own kernels, in Gluon: Triton's explicit dialect."""
