"""Routes of ottava's own."""
