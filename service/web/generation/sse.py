"""Server-sent events, and work that stops when its client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
PAUSE_EVERY = 8
"""Events; a pause after each would cost a token a turn of the event loop, and most wait for their tokens anyway."""

DONE = b"data: [DONE]\n\n"

MARK = "\0text\0"
"""For a text that changes, see `Form`."""


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


def event(body: BaseModel) -> bytes:
    """One event of a stream: the fields that were set, as JSON."""
    return b"data: " + body.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class Form:
    """An event that is the same each time but for a few values: encoded once, filled in with those.

    Args:
        body: the event, with marks for the values that change, in the order of its fields.
        marks: each of them something that the event has nowhere else.

    Raises:
        ValueError: a mark is not there exactly once.
    """

    def __init__(self, body: BaseModel, *marks: object) -> None:
        self._form = event(body).replace(b"%", b"%%")
        for mark in map(to_json, marks):
            if self._form.count(mark) != 1:
                raise ValueError(f"{mark!r} is not there exactly once: {self._form!r}")
            self._form = self._form.replace(mark, b"%b")

    def event(self, *values: object) -> bytes:
        """The event with these values."""
        return self._form % tuple(map(to_json, values))


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
        num_sent = 0
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            num_sent += 1
            # Events that have piled up would go out without a pause: let the others, and a disconnect, come between.
            if num_sent % PAUSE_EVERY == 0:
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
