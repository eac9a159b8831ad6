"""Turns a float checkpoint into an int8 one, layer by layer."""
