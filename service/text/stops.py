"""The text of an answer, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from service.text.protocols import DetokenizerLike


class Output:
    """Decodes one answer incrementally, up to the first stop string."""

    def __init__(self, decoder: DetokenizerLike, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = StopStrings(stops)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.found is not None

    def take(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Add tokens. Returns the text to send and the number of tokens taken: those up to a stop string's last."""
        text = ""
        for place, token_id in enumerate(token_ids):
            text += self._stops.push(self._decoder.push(token_id))
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

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = tuple(stops)
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
            _, at, self.found = min(matches)
            self._held = ""
            return text[:at]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """The text that was held back but is not a stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(len(text), longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
