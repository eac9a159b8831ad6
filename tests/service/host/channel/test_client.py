"""The web's side of the engines, over an application that is started and ended."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.api import SamplingParams
from service.errors import EngineFailed
from tests.support.harness import app_of, client_of, two_engines

BODY = {"prompt": "hi", "max_tokens": 4, "ignore_eos": True}


def test_an_application_that_has_ended_can_be_started_again() -> None:
    async def go() -> list[int]:
        app = app_of(two_engines())
        statuses = []
        for _ in range(3):
            async with client_of(app) as client:
                statuses += [(await client.post("/generate", json=BODY)).status_code for _ in range(2)]
        return statuses

    assert asyncio.run(go()) == [200] * 6


def test_who_asks_engines_that_were_closed_is_refused_and_does_not_wait() -> None:
    async def go() -> None:
        app = app_of(two_engines())
        async with client_of(app):
            engine = app.state.serving.engines["w8a8"]
        with pytest.raises(EngineFailed, match="has stopped"):
            engine.submit([1, 2], SamplingParams(4), "a")

    asyncio.run(go())
