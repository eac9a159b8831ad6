"""The commands other than `ottava serve`."""
