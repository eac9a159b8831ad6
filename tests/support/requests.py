"""Requests as a scheduler gets them."""

from __future__ import annotations

from service.engine.api import SamplingParams
from service.engine.request import Request


def new_request(name: str, prompt_len: int, max_tokens: int = 4, **params) -> Request:
    return Request(name, list(range(100, 100 + prompt_len)), SamplingParams(max_tokens, **params), 0.0, 0)
