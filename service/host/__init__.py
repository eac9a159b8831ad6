"""The model host: loads, checks and reloads the variants, and connects them to the web."""
