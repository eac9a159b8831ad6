"""Finds calls in an answer that the model was free to write."""

from __future__ import annotations

from collections.abc import Set

from service.text.stops import num_at_start
from service.text.tools.calls import Arguments, Called, Event, Said
from service.text.tools.format import Format
from service.text.tools.reader import CallReader

BLANKS = " \t\r\n"
MAX_FAILURES = 16
"""Openings that turn out to be text, after which all else is text: each may have to be read to the answer's end."""


class FreeParser:
    """What is not a complete, valid call stays text. Implements `ToolParser`.

    A call is reported once it is complete. Blanks beside a call are dropped, unless text comes before and behind.

    Args:
        format_: how the model writes calls.
        names: the tools that there are. A call without an opening marker must name one, as any JSON may be an answer.
        most: calls to report, None for any number; those after it are dropped.
    """

    def __init__(self, format_: Format, names: Set[str], most: int | None = None) -> None:
        self._format = format_
        self._names = names
        self._most = most
        self._events: list[Event] = []
        self._text = ""
        """Text that has not been passed on, while no call is being read."""
        self._reader: CallReader | None = None
        self._opening = ""
        self._tried = ""
        """What the reader has been given."""
        self._blanks = ""
        self._has_text = False
        self._is_after_call = False
        self._num_calls = 0
        self._num_failures = 0

    def push(self, text: str) -> list[Event]:
        """See `ToolParser`."""
        if self._reader is None:
            self._text += text
        else:
            self._try(self._reader, text)
        return self._advanced(is_over=False)

    def flush(self) -> list[Event]:
        """See `ToolParser`."""
        events = self._advanced(is_over=True)
        if self._blanks and not self._is_after_call:
            events.append(Said(self._blanks))
        return events

    def _advanced(self, *, is_over: bool) -> list[Event]:
        while self._reader is not None or self._open(is_over=is_over):
            reader = self._reader
            assert reader is not None
            if is_over and not reader.is_done:
                reader.flush()
            if not reader.is_done:
                break
            self._close(reader)
        events, self._events = self._events, []
        return events

    def _open(self, *, is_over: bool) -> bool:
        """Pass text on up to the next opening. Whether one was found, so that a reader is in place."""
        text = self._text
        place, opening = self._next_opening(text)
        if place < 0:
            # The rest may be part of an opening that is still incomplete.
            passed = len(text) if is_over else len(text) - num_at_start(text, (self._format.opening,))
            self._text = text[passed:]
            self._say(text[:passed])
            return False
        self._say(text[:place])
        self._text, self._opening, self._tried = "", opening, ""
        is_bare = opening == "{"
        self._reader = CallReader(self._format, self._names if is_bare else None)
        if is_bare:
            self._reader.push(opening)
        self._try(self._reader, text[place + len(opening) :])
        return True

    def _try(self, reader: CallReader, text: str) -> None:
        self._tried += text
        reader.push(text)

    def _close(self, reader: CallReader) -> None:
        self._reader = None
        if reader.calls is None:
            self._num_failures += 1
            self._say(self._opening)
            self._text = self._tried
            return
        self._text = reader.rest
        for call in reader.calls:
            if self._most is None or self._num_calls < self._most:
                self._events += [Called(self._num_calls, call.name), Arguments(self._num_calls, call.arguments)]
                self._num_calls += 1
        self._is_after_call = True

    def _next_opening(self, text: str) -> tuple[int, str]:
        """Where the next call may begin, -1 if nowhere, and by what."""
        if self._num_failures >= MAX_FAILURES:
            return -1, ""
        if self._format.is_bare and not self._has_text:
            start = len(text) - len(text.lstrip(self._blank_chars))
            if text[start : start + 1] == "{":
                return start, "{"
        return text.find(self._format.opening), self._format.opening

    @property
    def _blank_chars(self) -> str:
        # A semicolon stands between two calls of Llama 3.
        return BLANKS + ";" if self._format.is_bare and self._num_calls else BLANKS

    def _say(self, text: str) -> None:
        """Pass text on, but for the blanks at its end."""
        body = text.rstrip(self._blank_chars)
        if not body:
            self._blanks += text
            return
        said = self._blanks + body
        if self._num_calls and not self._has_text:
            said = said.lstrip(self._blank_chars)
        self._events.append(Said(said))
        self._blanks = text[len(body) :]
        self._has_text, self._is_after_call = True, False
