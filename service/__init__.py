"""The server: engine, models and HTTP."""
