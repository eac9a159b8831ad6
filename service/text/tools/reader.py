"""Reads one call behind its opening marker."""

from __future__ import annotations

from collections.abc import Sequence, Set

from service.text.tools.format import Call, Format, Head, calls_of
from service.text.tools.json_end import JsonEnd

MAX_HEADER_CHARS = 256
"""Longest text between a call's marker and its JSON; anything longer is no call."""


class CallReader:
    """Reads a call, or a list of calls, from the text behind its opening.

    Args:
        format_: how the model writes calls.
        known: the names that a call may have; None for any.
    """

    def __init__(self, format_: Format, known: Set[str] | None) -> None:
        self.calls: Sequence[Call] | None = None
        """Set once they are complete."""
        self.has_failed = False
        """Whether it is certain that there is no call."""
        self.rest = ""
        """The text behind complete calls."""
        self._format = format_
        self._known = known
        self._header = ""
        self._head: tuple[Head, str] | None = None
        self._end = JsonEnd()
        self._json: list[str] = []
        self._found: Sequence[Call] | None = None
        self._behind = ""

    @property
    def is_done(self) -> bool:
        return self.has_failed or self.calls is not None

    def push(self, text: str) -> None:
        """Add text; not once `is_done`."""
        if self._head is None:
            text = self._read_header(text)
        if self._head is not None and self._found is None and not self.has_failed:
            text = self._read_json(text, self._head)
        if self._found is not None:
            self._read_closing(text)

    def flush(self) -> None:
        """The answer is over. Complete JSON is a call even if the closing marker is missing or cut off."""
        if self._found is not None and self._format.closing.startswith(self._behind.strip()):
            self.calls = self._found
        else:
            self.has_failed = True

    def _read_header(self, text: str) -> str:
        """Add text to the header, up to the first brace; returns the JSON behind it."""
        before, brace, after = text.partition("{")
        self._header += before
        if brace:
            self._head = self._format.head(self._header)
        self.has_failed = len(self._header) > MAX_HEADER_CHARS or (bool(brace) and self._head is None)
        if self._head is None:
            return ""
        return ("[{" if self._head[0] is Head.CALLS else "{") + after

    def _read_json(self, text: str, head: tuple[Head, str]) -> str:
        """Add text to the JSON, up to its end; returns the text behind it."""
        end = self._end.push(text)
        self._json.append(text[:end])
        if end is None:
            return ""
        self._found = calls_of("".join(self._json), *head, self._known)
        self.has_failed = self._found is None
        return text[end:]

    def _read_closing(self, text: str) -> None:
        closing = self._format.closing
        self._behind += text
        seen = self._behind.lstrip() if closing else self._behind
        if seen.startswith(closing):
            self.calls, self.rest = self._found, seen[len(closing) :]
        elif not closing.startswith(seen):
            self.has_failed = True
