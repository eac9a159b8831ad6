"""What the HTTP side needs of a tokenizer, and stop strings: text only, no tokenizer library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class DetokenizerLike(Protocol):
    """The text of one request's tokens, as they come."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is still in parts."""
        ...

    def flush(self) -> str:
        """What is left at the end: a character that stayed incomplete comes as U+FFFD."""
        ...


class TokenizerLike(Protocol):
    """`service.text.tokenizer.Tokenizer` in production, something smaller in tests."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def apply_chat(self, messages: Sequence[dict[str, str]], is_open: bool = True) -> list[int]:
        """Token ids of a conversation; is_open: up to where the assistant goes on, with a new message or its last one.

        Raises InvalidRequest where the model has no chat template or the template refuses the messages.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """A token by name: its text, or where that is part of a character `bytes:` and the bytes in hexadecimal."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the UTF-8 of a text; of a special token, its name."""
        ...

    def detokenizer(self, context: Sequence[int] = ()) -> DetokenizerLike:
        """For one request; context: the tokens that its text continues."""
        ...
