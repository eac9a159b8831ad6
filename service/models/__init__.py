"""The models: a table of families and one decoder for all."""
