"""Text processing: tokenizers, stop strings, JSON grammars."""
