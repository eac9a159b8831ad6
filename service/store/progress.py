"""How far a long stage is: the protocol of who is told."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how far a stage is; total is 0 where its length is not known."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "", /) -> None:
        """detail: what came of the last part, and the seconds left, where a stage says so."""


def silent(_stage: str, _done: int, _total: int, _detail: str = "", /) -> None:
    """A `Progress` that shows nothing."""
