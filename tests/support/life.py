"""A server over scripted engines, from start to end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from service.engine.device.device_thread import DeviceThread
from service.engine.loop import EngineLoop
from service.engine.scheduler import Scheduler
from service.engine.supervision import FaultLimits
from service.host.channel.client import Link
from service.host.server import Reload, ServedHost, nothing_to_reload
from service.settings import Settings
from service.web.server import Server
from tests.support.harness import DEADLINE_S, ThreadLink, app_of, until
from tests.support.scripted_runner import ScriptedRunner

LETTERS = "".join(chr(65 + n) for n in range(57))


class Life:
    """A server in this process over two engines whose n-th token is the n-th letter."""

    def __init__(
        self,
        step_s: float = 0.005,
        reload: Reload = nothing_to_reload,
        link: Callable[[ServedHost], Link] = ThreadLink,
        **settings: Any,
    ) -> None:
        settings = {"engine_restarts": 0, **settings}
        self.settings = Settings(**settings)
        limits = FaultLimits(self.settings.engine_restarts, step_timeout_s=self.settings.step_timeout_s)
        self.runners = {name: ScriptedRunner(offset=65, step_s=step_s) for name in ("w8a8", "fp16")}
        device_thread = DeviceThread()
        self.engines = {
            name: EngineLoop(
                name,
                Scheduler(num_blocks=200, block_size=4, max_num_requests=8, max_batched_tokens=64),
                runner,
                device_thread=device_thread,
                max_model_len=1024,
                limits=limits,
            ).start()
            for name, runner in self.runners.items()
        }
        self.app = app_of(self.engines, reload=reload, link=link, **settings)
        self.server = Server(self.app, self.settings)
        self.client: httpx.AsyncClient

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Life]:
        """Serve within; at the end the server must have ended by itself."""
        listener = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.ensure_future(self.server.serve(sockets=[listener]))
        await until(lambda: self.server.started and self.app.state.serving.is_ready)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as self.client:
                yield self
            await asyncio.wait_for(serving, DEADLINE_S)
        finally:
            self.server.should_exit = True
            await serving
            for engine in self.engines.values():
                engine.stop()

    def ask(self, num_tokens: int, **body: object) -> asyncio.Task[httpx.Response]:
        body = {"prompt": "x", "max_tokens": num_tokens, **body}
        return asyncio.ensure_future(self.client.post("/generate", json=body))

    async def running(self, count: int) -> None:
        await until(lambda: sum(engine.stats().num_running for engine in self.engines.values()) == count)

    def assert_empty(self) -> None:
        for engine in self.engines.values():
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage_ratio) == (0, 0, 0)
