"""JSON schemas as grammars, compiled for a vocabulary."""
