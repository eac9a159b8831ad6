"""Finds where a JSON value ends, as it arrives."""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')


class JsonEnd:
    """Counts brackets outside strings, from a value's first one on. It does not check the JSON."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = False
        self._is_escaped = False

    def push(self, text: str) -> int | None:
        """The index behind the value's last character, or None if it goes on."""
        place = 0
        if self._is_escaped and text:
            place, self._is_escaped = 1, False
        while (found := (_INSIDE if self._is_string else _OUTSIDE).search(text, place)) is not None:
            place = found.end()
            match found[0]:
                case '"':
                    self._is_string = not self._is_string
                case "\\":
                    self._is_escaped = place == len(text)
                    place += 1
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return place
        return None
