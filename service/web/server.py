"""The server process: signals, draining and exit codes."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from service.errors import OttavaError, StartupError
from service.process import end_process, settle
from service.settings import Settings
from service.web.draining import FAREWELL_S, drain
from service.web.state import Serving
from service.web.uvicorn_config import allow_open_files, server_config

FAILED = os.EX_SOFTWARE
"""Exit code after an engine has failed for good."""

FORCED = 128
"""Exit code after a second signal, plus the signal's number, as in shells."""

SWITCH_INTERVAL_S = 1e-4
"""Python's thread switch interval if the engine runs in this process. An engine acquires the interpreter lock several
times in a step of about 6 ms, and by default would wait up to 5 ms each time for a busy event loop."""

log = logging.getLogger(__name__)


def run(app: FastAPI, settings: Settings) -> int:
    """Serve the app until a signal or an engine's failure ends it. Returns the exit code of the process.

    The first SIGTERM or SIGINT drains: new requests get 503, active ones have drain_timeout_s to finish, and the exit
    code is 0. A second one ends the process at once. SIGHUP reloads.

    Raises:
        StartupError: the engines could not be started.
    """
    granted = allow_open_files(settings.max_connections)
    log.debug("this process may open %d files", granted)
    server = Server(app, settings)
    server.run()
    failure = server.serving.host.failure
    if isinstance(failure, StartupError):
        raise failure
    if settings.in_process:
        # The interpreter's shutdown could hang or crash if a thread is still computing.
        end_process(server.exit_code)
    return server.exit_code


class Server(uvicorn.Server):
    """uvicorn's server with our signal handlers."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(server_config(app, settings, timeout_graceful_shutdown=math.ceil(FAREWELL_S)))
        self.exit_code = 0
        self.serving: Serving = app.state.serving
        self._settings = settings
        self._is_told = False
        self._draining: asyncio.Task[None] | None = None
        self._reloading: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.serve`."""
        settle()
        if self._settings.in_process:
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        watching = asyncio.create_task(self._watch())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install our signal handlers; uvicorn enters this context for as long as it serves."""
        loop = asyncio.get_running_loop()
        handlers: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: lambda: self._on_end(signal.SIGTERM),
            signal.SIGINT: lambda: self._on_end(signal.SIGINT),
            signal.SIGHUP: self._on_reload,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    async def _watch(self) -> None:
        """Wait for an engine to fail for good, and then stop the server."""
        host = self.serving.host
        await host.failed.wait()
        if isinstance(host.failure, StartupError):
            self.exit_code = 1
            self.should_exit = True
        elif not self._settings.exit_on_failure:
            log.error("an engine has failed for good; exit_on_failure is off, so its requests get 500 from now on")
        else:
            self.exit_code = FAILED
            # No request can finish behind a stuck step, so there is nothing to wait for.
            timeout_s = 0.0 if host.is_stuck else self._settings.drain_timeout_s
            self._drain(timeout_s, "an engine has failed for good")

    def _on_end(self, number: signal.Signals) -> None:
        if self._is_told:
            log.warning("%s again: exiting at once", number.name)
            end_process(FORCED + number)
        self._is_told = True
        self._drain(self._settings.drain_timeout_s, number.name)

    def _on_reload(self) -> None:
        log.info("SIGHUP: reloading")
        self._reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        try:
            await self.serving.reload(None)
        except OttavaError as error:
            log.error("SIGHUP: %s", error.message)  # noqa: TRY400 (the message says why)

    def _drain(self, timeout_s: float, why: str) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._end(timeout_s, why))

    async def _end(self, timeout_s: float, why: str) -> None:
        """Drain, then let uvicorn shut down."""
        try:
            await drain(self.serving, timeout_s, why)
        finally:
            self.should_exit = True
