"""The server: engine, models, HTTP and command line."""
