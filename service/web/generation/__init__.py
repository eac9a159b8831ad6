"""One generation, from its plan to its last event; every route is built on it."""
