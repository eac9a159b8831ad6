"""Quantization: a float checkpoint in, an int8 checkpoint out, and the Linear classes that run it."""

__version__ = "0.1.0"
"""Of ottava: here, since this package alone is imported by every other but the kernels, and imports no torch."""
