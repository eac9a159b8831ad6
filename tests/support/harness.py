"""An app over fake engines, reached in process or over a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from service.engine.api import HostInfo, Reloaded
from service.engine.grammar import Grammars
from service.engine.messages import News
from service.host.channel.client import HostClient, Link
from service.host.channel.messages import ToEngine, ToWeb
from service.host.channel.socket import LoopEnd, ThreadEnd, pair
from service.host.limits import fault_limits
from service.host.server import HostServer, ServedHost, nothing_to_reload
from service.process import start_thread
from service.settings import Settings
from service.text.protocols import TokenizerLike
from service.web.app import create_app
from service.web.uvicorn_config import server_config
from tests.support.fake_engine import INFO, ByteTokenizer, FakeEngine, FakeGrammars, FakeHost, OwnedEngine

DEADLINE_S = 120.0
"""For what takes moments on a quiet machine: only a hang takes as long on any."""


def engines_of(*engines: FakeEngine) -> dict[str, FakeEngine]:
    return {engine.variant: engine for engine in engines}


def two_engines(**options: Any) -> dict[str, FakeEngine]:
    log: list[tuple[str, str]] = []
    return engines_of(FakeEngine("w8a8", log=log, **options), FakeEngine("fp16", log=log, **options))


TURNS = 200
"""Of the event loop that a test's news waits for those before it to be read: whoever does not read keeps nobody."""


class ThreadLink:
    """Engines behind a real channel whose other end is served by threads of this process.

    One piece of news waits until the streams have been read of the one before it, so that what a fake engine says in
    one step is told by one event, however busy the machine is.
    """

    can_renew = False
    pid = None

    def __init__(self, host: ServedHost, is_paced: bool = True) -> None:
        self._host = host
        self._is_paced = is_paced
        self._end: LoopEnd[ToWeb] | None = None
        self._told: asyncio.Queue[ToWeb] = asyncio.Queue()
        self._telling: asyncio.Task[None] | None = None

    async def open(self, receive: Callable[[ToWeb], None], on_gone: Callable[[str], None]) -> None:
        ours, theirs = pair()
        self._told = asyncio.Queue()
        self._end = LoopEnd(
            msgspec.msgpack.Decoder(ToWeb),
            self._told.put_nowait if self._is_paced else receive,
            lambda: on_gone("the test's channel was closed"),
        )
        if self._is_paced:
            self._telling = asyncio.create_task(self._tell(receive))
        await self._end.attach(ours)
        far = ThreadEnd(theirs, msgspec.msgpack.Decoder(ToEngine))
        server = HostServer(lambda _: self._host, far.send)

        def serve() -> None:
            far.read_all(server.receive)
            server.stop(0.0)
            theirs.close()

        start_thread("open", server.open).add_done_callback(lambda _: start_thread("channel", serve))

    def send(self, message: ToEngine) -> None:
        if self._end is not None:
            self._end.send(message)

    async def close(self, timeout_s: float) -> None:
        if self._end is not None:
            self._end.close()
            # Until what the other side sent meanwhile has come to nothing.
            await asyncio.sleep(0)
        if self._telling is not None:
            self._telling.cancel()

    async def _tell(self, receive: Callable[[ToWeb], None]) -> None:
        while True:
            message = await self._told.get()
            receive(message)
            client = getattr(receive, "__self__", None)
            if isinstance(message, News) and client is not None:
                streams = client.engines[message.variant]._streams
                read = [streams[handle] for handle in dict.fromkeys(message.handles) if handle in streams]
                for _ in range(TURNS):
                    if not any(stream._tokens for stream in read):
                        break
                    await asyncio.sleep(0)
                del read
            del message


def host_of(
    link: Link, engines: Mapping[str, object], settings: Settings, tokenizer: TokenizerLike | None = None
) -> HostClient:
    """The web's side of engines that are served over this link."""
    host = HostClient(
        tuple(engines),
        link,
        load_tokenizer=lambda _: tokenizer or ByteTokenizer(),
        limits=fault_limits(settings),
        max_waiting=settings.max_waiting,
    )
    for name, engine in engines.items():
        if hasattr(engine, "attach"):
            engine.attach(host.engines[name])
    return host


def app_of(
    engines: Mapping[str, OwnedEngine],
    self_check: Callable[[], Mapping[str, str]] = dict,
    tokenizer: TokenizerLike | None = None,
    reload: Callable[[str | None], Reloaded] = nothing_to_reload,
    link: Callable[[ServedHost], Link] = ThreadLink,
    grammars: Grammars | None = None,
    info: HostInfo = INFO,
    **settings: Any,
) -> FastAPI:
    """An app over engines that are there already, behind a channel unless told otherwise."""
    given = Settings(**settings)
    served = FakeHost(engines, self_check, reload, info, grammars or FakeGrammars())
    app = create_app(host_of(link(served), engines, given, tokenizer), given)
    app.state.served = served
    return app


class Kept:
    """A host that outlives the apps over it."""

    def __init__(self, host: ServedHost) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def stop(self, timeout_s: float = 10.0) -> None:
        pass


def app_over(host: ServedHost, settings: Settings, tokenizer: TokenizerLike | None = None) -> FastAPI:
    """An app over a host that is open already, and stays so, behind a channel."""
    return create_app(host_of(ThreadLink(Kept(host)), host.engines, settings, tokenizer), settings)


@asynccontextmanager
async def client_of(app: FastAPI, wait_s: float = DEADLINE_S) -> AsyncIterator[httpx.AsyncClient]:
    """A client in process, once the self-check is done (or wait_s have passed)."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await until(lambda: app.state.serving.is_ready, wait_s, must=wait_s == DEADLINE_S)
            yield client


@asynccontextmanager
async def server_of(app: FastAPI, log_level: str = "error") -> AsyncIterator[int]:
    """A real server on a loopback port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app, app.state.serving.settings, log_level=log_level))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started and app.state.serving.is_ready)
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


async def until_ready(client: httpx.AsyncClient, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server in a process of its own is ready; it must not end before."""
    end_s = time.monotonic() + DEADLINE_S
    while not await _is_ready(client):
        assert server.poll() is None
        assert time.monotonic() < end_s
        await asyncio.sleep(0.05)


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


def post(body: object, app: FastAPI | None = None, **engine_options: Any) -> httpx.Response:
    """One POST /generate against fresh engines."""

    async def go() -> httpx.Response:
        async with client_of(app or app_of(two_engines(**engine_options))) as client:
            return await client.post("/generate", json=body)

    return asyncio.run(go())


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
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


def named_events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream whose events have their type as a name."""
    assert response.status_code == 200, response.text
    chunks = response.text.split("\n\n")
    assert chunks.pop() == ""
    events = []
    for chunk in chunks:
        name, data = chunk.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


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
