"""Quantization: a float checkpoint in, an int8 checkpoint out, and the Linear classes that run it."""

__version__ = "0.2.0"
"""The version of ottava. It is defined here because service imports this package, and it imports no torch."""
