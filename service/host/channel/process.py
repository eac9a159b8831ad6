"""Starts and stops the engines' process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from service.host.channel.messages import Open, Stop, ToEngine, ToWeb
from service.host.channel.socket import LoopEnd, pair
from service.settings import Settings, without_secrets
from service.settings.file import ENV_PREFIX

COMMAND = (sys.executable, "-m", "service.host.engine_process")
EXIT_S = 1.0
"""Time to wait for the exit code after the process has closed its end of the channel."""


class ProcessLink:
    """Implements `service.host.channel.client.Link` with a child process.

    Args:
        settings: the engines' settings.
        command: starts the process; the file descriptor of its end of the channel is appended as an argument.
    """

    can_renew = True

    def __init__(self, settings: Settings, command: Sequence[str] = COMMAND) -> None:
        self._settings = settings
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._end: LoopEnd[ToWeb] | None = None
        self._waiting: asyncio.Task[None] | None = None

    async def open(self, receive: Callable[[ToWeb], None], on_gone: Callable[[str], None]) -> None:
        """Start a process. Raises OSError if that fails."""
        closed = asyncio.Event()
        ours, theirs = pair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                str(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
            )
        self._end = LoopEnd(msgspec.msgpack.Decoder(ToWeb), receive, closed.set)
        await self._end.attach(ours)
        self._end.send(Open(without_secrets(self._settings)))
        self._waiting = asyncio.create_task(_tell_end(self._process, closed, on_gone))

    @property
    def pid(self) -> int | None:
        """The process, while it runs."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    def send(self, message: ToEngine) -> None:
        """Send a message. Does nothing if the process has exited."""
        if self._end is not None:
            self._end.send(message)

    async def close(self, timeout_s: float) -> None:
        """Stop the process; kill it after timeout_s."""
        process = self._process
        if process is None:
            return
        if process.returncode is None and timeout_s > 0:
            self.send(Stop())
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), timeout_s)
        if process.returncode is None:
            process.kill()
        await process.wait()
        if self._end is not None:
            self._end.close()
        if self._waiting is not None:
            self._waiting.cancel()


async def _tell_end(process: asyncio.subprocess.Process, closed: asyncio.Event, on_gone: Callable[[str], None]) -> None:
    """Report how the process exited, once its end of the channel is closed, which any kind of exit does at once."""
    await closed.wait()
    try:
        code = await asyncio.wait_for(process.wait(), EXIT_S)
    except TimeoutError:
        on_gone("its process has closed the channel")
        return
    on_gone(
        f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process exited with {code}"
    )


def _environment() -> dict[str, str]:
    """The environment of the process: the same module path, but no settings, which it gets by the channel."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return own | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
