"""Finds, downloads and quantizes models: from a name to a folder that can be served."""
