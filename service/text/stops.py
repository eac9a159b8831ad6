"""The text of an answer, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.text.protocols import DetokenizerLike, TokenizerLike


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends an answer's text, and which special tokens are part of it.

    stops: strings that end it.
    token_ids: tokens that end it; they have no text of their own.
    is_included: whether the text has the string or token that ended it.
    min_tokens: tokens whose text is not searched for stops.
    shown: special tokens that are shown by their names.
    """

    stops: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()
    is_included: bool = False
    min_tokens: int = 0
    shown: frozenset[str] = frozenset()

    def output(self, tokenizer: TokenizerLike, context: Sequence[int] = ()) -> Output:
        """A decoder of one answer; context: the tokens that its text continues."""
        return Output(tokenizer.detokenizer(context, self.shown), self)


class Output:
    """Decodes one answer incrementally, up to the first stop string."""

    def __init__(self, decoder: DetokenizerLike, ending: Ending) -> None:
        self._decoder = decoder
        self._stops = StopStrings(ending.stops, ending.is_included)
        self._silent_ids = frozenset() if ending.is_included else ending.token_ids
        self._num_unsearched = ending.min_tokens

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self.found is not None

    @property
    def found(self) -> str | None:
        """The stop string that is complete."""
        return self._stops.found

    def take(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Add tokens. Returns the text to send and the number of tokens taken: those up to a stop string's last."""
        text = ""
        for place, token_id in enumerate(token_ids):
            new = "" if token_id in self._silent_ids else self._decoder.push(token_id)
            if self._num_unsearched:
                self._num_unsearched -= 1
                text += new
                continue
            text += self._stops.push(new)
            if self.is_stopped:
                return text, place + 1
        return text, len(token_ids)

    def flush(self) -> str:
        """The rest of the text, after the last token."""
        return self._stops.push(self._decoder.flush()) + self._stops.flush()


class StopStrings:
    """Passes text through up to the first stop string, which may arrive in parts.

    The first one is the one that would be complete first if the text came character by character; of two complete at
    the same character, the longer. So the cut does not depend on how the text was split into tokens.
    """

    def __init__(self, stops: Sequence[str], is_included: bool = False) -> None:
        """is_included: whether the stop string is part of the text."""
        self.found: str | None = None
        self._stops = tuple(stops)
        self._is_included = is_included
        self._held = ""

    def push(self, text: str) -> str:
        """Add text and return the text to send. Text that may be the start of a stop string is held back."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        text = self._held + text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            end, at, self.found = min(matches)
            self._held = ""
            return text[: end if self._is_included else at]
        num_held = num_at_start(text, self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """The text that was held back but is not a stop string."""
        held, self._held = self._held, ""
        return held


def num_at_start(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of the text with which a marker begins, but is not complete."""
    longest = max((len(marker) for marker in markers), default=0)
    for length in range(min(len(text), longest - 1), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
