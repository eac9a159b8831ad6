"""Divides an answer into what the model thinks, between `<think>` and `</think>`, and what it says."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from service.text.stops import num_at_start

OPENING, CLOSING = "<think>", "</think>"
MARKERS = frozenset({OPENING, CLOSING})
BLANKS = " \t\r\n"


class Thought(NamedTuple):
    """New text of both kinds."""

    reasoning: str
    content: str


class Stage(Enum):
    """Where an answer is."""

    START = auto()
    INSIDE = auto()
    BEHIND = auto()
    """Behind the reasoning, before the first text that is no blank."""
    CONTENT = auto()


class ReasoningParser:
    """Reads an answer that arrives in pieces. Blanks around the reasoning are dropped.

    Args:
        is_open: whether the answer begins inside the reasoning, because the prompt has opened it.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._stage = Stage.INSIDE if is_open else Stage.START
        self._held = ""
        self._has_reasoning = False

    def push(self, text: str) -> Thought:
        """Add text and return what it completes."""
        return self._take(text, is_over=False)

    def flush(self) -> Thought:
        """What was held back, after the last text."""
        return self._take("", is_over=True)

    def _take(self, text: str, *, is_over: bool) -> Thought:
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._stage is Stage.START:
            text = self._begin(text, is_over=is_over)
        if self._stage is Stage.INSIDE:
            reasoning, text = self._reason(text, is_over=is_over)
        if self._stage is Stage.BEHIND:
            text = text.lstrip(BLANKS)
            self._stage = Stage.CONTENT if text else Stage.BEHIND
        return Thought(reasoning, text)

    def _begin(self, text: str, *, is_over: bool) -> str:
        """Look for the opening at the start of the answer; returns the text behind it, or all if there is none."""
        seen = text.lstrip(BLANKS)
        if seen.startswith(OPENING):
            self._stage = Stage.INSIDE
            return seen[len(OPENING) :]
        if OPENING.startswith(seen) and not is_over:
            self._held = text
            return ""
        self._stage = Stage.CONTENT
        return text

    def _reason(self, text: str, *, is_over: bool) -> tuple[str, str]:
        """The new reasoning in the text, and what comes behind it."""
        text = text if self._has_reasoning else text.lstrip(BLANKS)
        before, closed, behind = text.partition(CLOSING)
        if closed:
            self._stage = Stage.BEHIND
            return before.rstrip(BLANKS), behind
        kept = text if is_over else text[: len(text) - num_at_start(text, (CLOSING,))]
        shown = kept.rstrip(BLANKS)
        self._held = text[len(shown) :]
        self._has_reasoning = self._has_reasoning or bool(shown)
        return shown, ""
