"""The engine: which tokens run in which step, and the step itself."""
