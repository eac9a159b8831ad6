"""An app over fake engines, reached in process or over a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from service.settings import Settings
from service.web.app import create_app
from service.web.uvicorn_config import server_config
from tests.support.fake_engine import ByteTokenizer, FakeEngine

DEADLINE_S = 30.0


def engines_of(*engines: FakeEngine) -> dict[str, FakeEngine]:
    return {engine.variant: engine for engine in engines}


def two_engines(**options: object) -> dict[str, FakeEngine]:
    log: list[tuple[str, str]] = []
    return engines_of(FakeEngine("w8a8", log=log, **options), FakeEngine("fp16", log=log, **options))


def app_of(
    engines: Mapping[str, FakeEngine],
    self_check: Callable[[], Mapping[str, str]] = dict,
    tokenizer: object = None,
    **settings: object,
) -> FastAPI:
    info = {"model": "fake", "versions": {"ottava": "0"}}
    return create_app(engines, Settings(**settings), tokenizer or ByteTokenizer(), lambda: info, self_check)


@asynccontextmanager
async def client_of(app: FastAPI, wait_s: float = DEADLINE_S) -> AsyncIterator[httpx.AsyncClient]:
    """A client in process, once the self-check is done (or wait_s have passed)."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await until(lambda: app.state.serving.refused is not None, wait_s, must=wait_s == DEADLINE_S)
            yield client


@asynccontextmanager
async def server_of(app: FastAPI, log_level: str = "error") -> AsyncIterator[int]:
    """A real server on a loopback port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app, app.state.serving.settings, log_level=log_level))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started and app.state.serving.refused is not None)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving
        listener.close()


async def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S, must: bool = True) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    while not condition() and loop.time() < end:
        await asyncio.sleep(0.002)
    assert condition() or not must


def post(body: object, app: FastAPI | None = None, **engine_options: object) -> httpx.Response:
    """One POST /generate against fresh engines."""

    async def go() -> httpx.Response:
        async with client_of(app or app_of(two_engines(**engine_options))) as client:
            return await client.post("/generate", json=body)

    return asyncio.run(go())


def events_of(response: httpx.Response) -> list[dict]:
    """The JSON events of a stream; the last line must be [DONE] unless the last event is an error."""
    chunks = response.text.split("\n\n")
    assert chunks.pop() == ""
    assert all(chunk.startswith("data: ") for chunk in chunks)
    data = [chunk.removeprefix("data: ") for chunk in chunks]
    if data[-1] == "[DONE]":
        data.pop()
    else:
        assert "error" in json.loads(data[-1])
    return [json.loads(item) for item in data]


async def metrics_of(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """(name, label=value, ...) -> value."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            samples[(sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items())))] = sample.value
    return samples


def total(samples: Mapping[tuple[str, ...], float], name: str) -> float:
    return sum(value for key, value in samples.items() if key[0] == name)
