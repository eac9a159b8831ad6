"""Server-sent events, and work that stops when its client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


def event(body: BaseModel) -> bytes:
    """One event of a stream: the fields that were set, as JSON."""
    return b"data: " + body.model_dump_json(exclude_unset=True).encode() + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """The result of work, which is cancelled as soon as the client leaves. The request's body must have been read.

    Raises:
        ClientGone: the client left first.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response):
    """Sends events as they come. `close` runs in any case, even where the client left before the first event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._close = close
        # Proxies that buffer would turn a stream into one late answer.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await unless_disconnected(receive, self._send(send))
        except ClientGone:
            return
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            # Events that have piled up would go out without a pause: let the others, and a disconnect, come between.
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
