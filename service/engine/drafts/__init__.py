"""Draft tokens: what they are, and when they pay."""
