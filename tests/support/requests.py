"""Requests as a scheduler gets them."""

from __future__ import annotations

from typing import Any, Self

from service.engine.api import SamplingParams
from service.engine.grammar import Matcher
from service.engine.request import Request


class Anything:
    """A grammar of every text."""

    def matcher(self) -> Self:
        return self

    is_ready = True
    mask_s = 0.0

    def allowed(self) -> bytes:
        return b"\xff"

    def accept(self, token_id: int) -> None:
        pass


def new_request(
    name: str, prompt_len: int, max_tokens: int = 4, matcher: Matcher | None = None, **params: Any
) -> Request:
    prompt = list(range(100, 100 + prompt_len))
    return Request(name, prompt, SamplingParams(max_tokens, **params), 0.0, 0, matcher=matcher)
