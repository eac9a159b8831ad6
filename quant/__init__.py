"""Quantization: a float checkpoint in, an int8 checkpoint out, and the Linear classes that run it."""
