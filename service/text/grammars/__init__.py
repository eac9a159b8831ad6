"""Grammars that answers are held to: compiled for a vocabulary, on trial first, and matched token by token."""
