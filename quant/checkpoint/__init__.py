"""Reads, describes and writes checkpoint folders."""
