"""Speculation that drafts whatever it can, so that most drafts are wrong."""

from __future__ import annotations

from service.engine.drafts.speculation import Speculation


class Eager(Speculation):
    def __init__(self, max_draft_tokens: int = 3, max_rows: int = 16) -> None:
        super().__init__(max_draft_tokens, max_rows, min_chance=0.0)

    def _rate(self, num_rows: int, has_drafts: bool, num_tokens: float) -> float:
        return num_tokens if has_drafts else 0.0
