"""The callback for the progress of a long stage."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the progress of a stage; total is 0 if unknown."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "", /) -> None:
        """detail: the result of the last part and the seconds left, or empty."""


def silent(_stage: str, _done: int, _total: int, _detail: str = "", /) -> None:
    """A `Progress` that does nothing."""
