"""Token ids back to text, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from service.errors import EngineFailed, first_line
from service.store.tokenizer_file import is_librarys

REPLACEMENT = "\ufffd"


# A character has at most 4 bytes, so this many tokens without a complete one are not valid text. They are sent as they
# are, which bounds the cost of a step.
MAX_PENDING = 64


# Tokens of the prompt that a continuation is decoded after: enough to include one with text.
NUM_CONTEXT = 8


# Most bytes of a character in UTF-8.
MAX_BYTES = 4


class Detokenizer:
    """Turns one request's tokens into text that never ends inside a character.

    A window of the last tokens is decoded again with each new one, since the text of a token depends on those before
    it; _prefix is the text of the part already sent. (`tokenizers`' DecodeStream does the same, but raises if a
    byte-fallback tokenizer changes text that it has already returned, as it does after invalid UTF-8.)

    Args:
        backend: tokenizer of the `tokenizers` library.
        context: the tokens that the text continues.
        hidden: the tokens that have no text; None for all special ones.
        alone: the text of a token by itself, special ones being hidden; remembered, since most tokens come again.
    """

    def __init__(
        self,
        backend: Backend,
        context: Sequence[int] = (),
        hidden: Set[int] | None = None,
        alone: Callable[[int], str] | None = None,
    ) -> None:
        self._backend = backend
        self._hidden = hidden
        self._alone = alone if hidden is None else None
        # Bytes one after the other: what is valid text by itself is the same text behind any other.
        self._joins = self._alone is not None and isinstance(backend.decoder, decoders.ByteLevel)
        self._window = self._end_of(context)
        self._num_sent = len(self._window)
        self._prefix = self._decode(self._window)

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes; empty while a character is incomplete."""
        if self._joins and len(self._window) == self._num_sent:
            text = self._decode([token_id])
            if text and REPLACEMENT not in text:
                self._window, self._num_sent, self._prefix = [token_id], 1, text
                return text
        self._window.append(token_id)
        text = self._pending_text()
        is_partial = not text or text.endswith(REPLACEMENT)
        return "" if is_partial and len(self._window) - self._num_sent < MAX_PENDING else self._sent(text)

    def flush(self) -> str:
        """The rest of the text, after the last token; an incomplete character becomes U+FFFD."""
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
        """The last tokens of the context, starting at the beginning of a character: a decoder may reject all bytes of
        a run that starts inside one. (The text itself may hold U+FFFD, so the start with the fewest is taken.)"""
        ends = [list(context[-num:]) for num in range(NUM_CONTEXT, NUM_CONTEXT + MAX_BYTES)]
        if REPLACEMENT not in self._decode(ends[0]):
            return ends[0]
        return min(ends, key=lambda end: self._decode(end).count(REPLACEMENT))

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        if len(ids) == 1 and self._alone is not None:
            return self._alone(ids[0])
        if self._hidden is None:
            return decoded(self._backend, ids)
        return decoded(self._backend, [i for i in ids if i not in self._hidden], hides_special=False)


def decoded(backend: Backend, ids: list[int], *, hides_special: bool = True) -> str:
    """The text of tokens.

    Raises:
        EngineFailed: the library fails on these tokens together; each by itself was tried at the start.
    """
    try:
        return backend.decode(ids, skip_special_tokens=hides_special)
    except BaseException as error:
        if not is_librarys(error):
            raise
        raise EngineFailed(
            f"the model's tokenizer fails to turn tokens into text: {first_line(error)}; this request is lost, "
            "others go on: mend the decoder of its tokenizer.json"
        ) from error
