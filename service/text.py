"""What the HTTP side needs of a tokenizer, and stop strings: text only, no tokenizer library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class DecoderLike(Protocol):
    """The text of one request's tokens, as they come."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is still in parts."""
        ...

    def flush(self) -> str:
        """What is left at the end: a character that stayed incomplete comes as U+FFFD."""
        ...


class TokenizerLike(Protocol):
    """`service.tokenizer.Tokenizer` in production, something smaller in tests."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def apply_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Raises InvalidRequest where the model has no chat template or the template refuses the messages."""
        ...

    def decoder(self) -> DecoderLike: ...


class StopStrings:
    """Lets text pass up to the first stop string, which may arrive in parts.

    The first is the one that is complete first, as if the text came character by character; of two complete at the
    same character, the longer. So the cut does not depend on how the text was split into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can go out now. Text that may be the start of a stop string is held back."""
        if self.found is not None:
            return ""
        text = self._held + text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            _, at, self.found = min(matches)
            self._held = ""
            return text[:at]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text that is the start of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(len(text), longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
