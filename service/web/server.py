"""The process that serves: its signals, how it drains, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from service.engine.loop import EngineLoop
from service.engine.supervision import StepStuck
from service.errors import Draining, OttavaError
from service.process import end_process, settle
from service.settings import Settings
from service.web.state import Serving
from service.web.uvicorn_config import allow_open_files, server_config

FAILED = os.EX_SOFTWARE
"""Exit code after an engine has failed for good."""

FORCED = 128
"""Added to a signal's number where it comes a second time, as shells count."""

STOP_S = 2.0
"""For an engine's thread to end; a step that takes longer is left behind."""

FAREWELL_S = 5.0
"""For the clients to read what their requests ended with."""

SWITCH_INTERVAL_S = 1e-4
"""After which whoever runs Python must let another thread have it. An engine asks for it several times in a step of
about 6 ms, and of an event loop that is busy with the tokens of a step would get it after 5 ms each time by default."""

log = logging.getLogger(__name__)


def run(app: FastAPI, settings: Settings, engines: Mapping[str, EngineLoop]) -> int:
    """Serve the app until a signal, or an engine that failed, ends it: the exit code of the process.

    The first SIGTERM or SIGINT drains: new requests get 503, those that run have drain_timeout_s to finish; then 0. A
    second one ends the process at once. SIGHUP reloads.
    """
    granted = allow_open_files(settings.max_connections)
    log.debug("this process may open %d files", granted)
    server = Server(app, settings, engines)
    server.run()
    server.stop_engines()
    return server.exit_code


class Server(uvicorn.Server):
    """uvicorn with our signals."""

    def __init__(self, app: FastAPI, settings: Settings, engines: Mapping[str, EngineLoop]) -> None:
        super().__init__(server_config(app, settings, timeout_graceful_shutdown=math.ceil(FAREWELL_S)))
        self.exit_code = 0
        self._settings = settings
        self._engines = engines
        self._serving: Serving = app.state.serving
        self._is_told = False
        self._draining: asyncio.Task[None] | None = None
        self._reloading: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Everything is loaded by now; see uvicorn's."""
        settle()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        await super().serve(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Called by uvicorn around all that it does, on the running event loop."""
        loop = asyncio.get_running_loop()
        handlers: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: lambda: self._on_end(signal.SIGTERM),
            signal.SIGINT: lambda: self._on_end(signal.SIGINT),
            signal.SIGHUP: self._on_reload,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        for engine in self._engines.values():
            engine.failed.add_done_callback(
                lambda failed: loop.is_closed() or loop.call_soon_threadsafe(self._on_failure, failed.result())
            )
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def stop_engines(self) -> None:
        """End every engine. Where a thread is still at work, the interpreter could hang or crash in taking it down."""
        for engine in self._engines.values():
            engine.stop(STOP_S)
        is_checking = self._serving.refused is None
        if is_checking or self._serving.reloads.is_running or any(e.is_alive for e in self._engines.values()):
            end_process(self.exit_code)

    def _on_end(self, number: signal.Signals) -> None:
        if self._is_told:
            log.warning("%s: ending at once", number.name)
            end_process(FORCED + number)
        self._is_told = True
        self._drain(self._settings.drain_timeout_s, number.name)

    def _on_failure(self, failure: Exception) -> None:
        if not self._settings.exit_on_failure:
            log.error("an engine has failed for good; exit_on_failure is off, so its requests get 500 from now on")
            return
        self.exit_code = FAILED
        # Behind a stuck step nothing moves: waiting would bring nobody an answer.
        timeout_s = 0.0 if isinstance(failure, StepStuck) else self._settings.drain_timeout_s
        self._drain(timeout_s, "an engine has failed for good")

    def _on_reload(self) -> None:
        log.info("SIGHUP: reloading")
        self._reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        try:
            await self._serving.reload(None)
        except OttavaError as error:
            log.error("SIGHUP: %s", error.message)  # noqa: TRY400 (told by its message)

    def _drain(self, timeout_s: float, why: str) -> None:
        lifecycle = self._serving.lifecycle
        if self._draining is None:
            lifecycle.drain(timeout_s)
            log.info("%s: draining, %d requests have up to %g s to finish", why, lifecycle.num_inside, timeout_s)
            self._draining = asyncio.ensure_future(self._end(timeout_s))

    async def _end(self, timeout_s: float) -> None:
        """Wait for the requests that run, end those that are left, then let uvicorn close what is open."""
        lifecycle = self._serving.lifecycle
        try:
            if not await lifecycle.emptied(timeout_s):
                log.warning("%d requests were not done within %g s and are ended", lifecycle.num_inside, timeout_s)
                error = Draining(
                    f"the server stopped before the request was done, {timeout_s:g} s after it had been told to; send "
                    "it again"
                )
                await asyncio.gather(
                    *(asyncio.to_thread(engine.stop, STOP_S, error) for engine in self._engines.values())
                )
                await lifecycle.emptied(FAREWELL_S)
        finally:
            self.should_exit = True
