"""The web's side of the engines, over an application that is started and ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from service.engine.api import SamplingParams
from service.errors import EngineFailed
from service.host.channel.messages import ToEngine, ToWeb
from service.settings import Settings
from service.web.app import create_app
from tests.support.harness import app_of, client_of, host_of, two_engines, until

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


class NoProcess:
    """A link whose process cannot be started."""

    can_renew = True
    pid = None

    async def open(self, receive: Callable[[ToWeb], None], on_gone: Callable[[str], None]) -> None:
        raise PermissionError(13, "Permission denied")

    def send(self, message: ToEngine) -> None:
        raise AssertionError("there is nobody to send to")

    async def close(self, timeout_s: float) -> None:
        """Nothing was opened."""


def test_an_engine_whose_process_cannot_be_started_has_failed() -> None:
    async def go() -> httpx.Response:
        settings = Settings(variants="w8a8")
        host = host_of(NoProcess(), {"w8a8": None}, settings)
        async with client_of(create_app(host, settings), wait_s=0.1) as client:
            await until(host.failed.is_set)
            return await client.get("/health")

    health = asyncio.run(go())
    assert health.status_code == 503
    assert "cannot be started: [Errno 13]" in health.json()["variants"]["w8a8"]
