"""The models: one table of families, one decoder."""
