"""Text in and out of a model: tokenizers, stop strings, JSON grammars."""
