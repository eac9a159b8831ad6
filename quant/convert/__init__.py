"""A float checkpoint in, an int8 checkpoint out, layer by layer."""
