"""Calls of tools in a model's answer: what formats look like, how they are read and how they are forced."""
