"""Runs one generation, from its plan to its last event. Every generation route is built on it."""
