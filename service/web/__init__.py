"""HTTP over any engines: no torch in this process."""
