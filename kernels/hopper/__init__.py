"""Kernels for Hopper only, in Gluon, Triton's explicit dialect."""
