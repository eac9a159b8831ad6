"""The HTTP server over the engines. Imports no torch."""
