"""From a name to a folder that can be served."""
