"""Tools, calls, and what a parser makes of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: JSON schema of its arguments; None: it takes none."""

    name: str
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins. index: its number in the answer, from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next piece of a call's arguments; all pieces of a call together are a JSON object."""

    index: int
    text: str


Event = Said | Called | Arguments


class ToolParser(Protocol):
    """Reads an answer that arrives in pieces. How it is split changes nothing but the sizes of the events."""

    def push(self, text: str) -> list[Event]:
        """Add text and return what it completes; text that may begin a call is held back."""
        ...

    def flush(self) -> list[Event]:
        """What was held back, after the last text."""
        ...
