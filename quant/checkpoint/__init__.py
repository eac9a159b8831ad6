"""Checkpoint folders: read, described, written."""
