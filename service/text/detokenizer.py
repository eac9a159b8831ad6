"""Token ids back to text, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as Backend

REPLACEMENT = "\ufffd"


# A character has at most 4 bytes; more tokens without a whole one are not valid text, and are let go as they are so
# that a step's cost stays bounded.
MAX_PENDING = 64


# Tokens of the prompt that a continuation is read behind: enough to hold one with a text.
NUM_CONTEXT = 8


# Of a character in UTF-8.
MAX_BYTES = 4


class Detokenizer:
    """Turns one request's tokens into text that never ends inside a character. Special tokens give no text.

    A window of the last tokens is decoded again with each new one, since the text of a token depends on the ones before
    it: _prefix is the text of the part that went out, the rest is pending. (`tokenizers`' DecodeStream does the same,
    but raises where a byte-fallback tokenizer takes back text it has given, as it does after invalid UTF-8.)
    """

    def __init__(self, backend: Backend, context: Sequence[int] = ()) -> None:
        self._backend = backend
        self._window = self._end_of(context)
        self._num_sent = len(self._window)
        self._prefix = self._decode(self._window)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is still in parts."""
        self._window.append(token_id)
        text = self._pending_text()
        is_partial = not text or text.endswith(REPLACEMENT)
        return "" if is_partial and len(self._window) - self._num_sent < MAX_PENDING else self._sent(text)

    def flush(self) -> str:
        """What is left at the end: a character that stayed incomplete comes as U+FFFD."""
        return self._sent(self._pending_text())

    def _pending_text(self) -> str:
        text = self._decode(self._window)
        if text.startswith(self._prefix):
            return text[len(self._prefix) :]
        return self._decode(self._window[self._num_sent :])

    def _sent(self, text: str) -> str:
        self._window = self._window[self._num_sent :]
        self._num_sent = len(self._window)
        self._prefix = self._decode(self._window)
        return text

    def _end_of(self, context: Sequence[int]) -> list[int]:
        """The last tokens of the context, from where a character begins: a decoder may reject all bytes of a run
        that begins inside one."""
        ends = [list(context[-num:]) for num in range(NUM_CONTEXT, NUM_CONTEXT + MAX_BYTES)]
        return next((end for end in ends if not self._decode(end).startswith(REPLACEMENT)), ends[0])

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)
