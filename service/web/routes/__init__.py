"""ottava's own routes."""
