"""Engines in the web's process, for debugging and tests: no channel, and no restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.host.channel.messages import ToEngine, ToWeb
from service.host.server import HostServer, ServedHost
from service.process import start_thread
from service.store.progress import Progress


class LocalLink:
    """Implements `service.host.channel.client.Link`. open_host: loads the engines; called on its own thread."""

    can_renew = False
    pid = None

    def __init__(self, open_host: Callable[[Progress], ServedHost]) -> None:
        self._open_host = open_host
        self._server: HostServer | None = None

    async def open(self, receive: Callable[[ToWeb], None], on_gone: Callable[[str], None]) -> None:  # noqa: ARG002
        """Load the engines on a thread."""
        loop = asyncio.get_running_loop()

        def send(message: ToWeb) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(receive, message)

        self._server = HostServer(self._open_host, send)
        start_thread("open", self._server.open)

    def send(self, message: ToEngine) -> None:
        """Pass a message to the engines."""
        if self._server is not None:
            self._server.receive(message)

    async def close(self, timeout_s: float) -> None:
        """Stop the engines; a step that runs longer than timeout_s is abandoned."""
        if self._server is not None:
            await asyncio.to_thread(self._server.stop, timeout_s)
