"""Engines over a scripted runner, and what becomes of their requests."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.api import SamplingParams
from service.engine.loop import EngineLoop
from service.engine.stream import RequestStream
from service.errors import EngineFailed

FAULT = RuntimeError("a kernel raised")


BOTH = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])


EITHER = pytest.mark.parametrize("where", ["on_execute", "on_read"])


async def outcome(stream: RequestStream, ids: list[int] | None = None) -> list[int] | EngineFailed:
    """The tokens, or what ended the request; those before it are in ids."""
    ids = [] if ids is None else ids
    try:
        async for tokens in stream:
            ids += [token.id for token in tokens]
    except EngineFailed as error:
        return error
    return ids


def run_all(engine: EngineLoop, lengths: list[int]) -> list[list[int] | EngineFailed]:
    async def go() -> list[list[int] | EngineFailed]:
        streams = [engine.submit([1, 2, 3], SamplingParams(max_tokens=n), str(i)) for i, n in enumerate(lengths)]
        return await asyncio.wait_for(asyncio.gather(*map(outcome, streams)), 20)

    return asyncio.run(go())


def assert_empty(engine: EngineLoop) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
