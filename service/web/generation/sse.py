"""Server-sent events, and cancellation of work when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import ClientGone
from service.web.chunks import WriteChunk, chunk_writer

T = TypeVar("T")
PAUSE_EVERY = 8
"""Events between two yields to the event loop. Yielding after each would cost one loop iteration per token, and most
events wait for their tokens anyway."""

DONE = b"data: [DONE]\n\n"

SEPARATORS = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\u0085\u2028\u2029")
"""What else than a line feed ends a line for some clients, and how JSON writes it in ASCII."""

MARK = "\0text\0"
"""A placeholder for text that changes; see `Form`."""


def event(body: BaseModel, name: str = "") -> bytes:
    """Encode an event with its set fields as JSON. name: of the event, for clients that read it."""
    head = f"event: {name}\n".encode() if name else b""
    return head + one_line(b"data: " + body.model_dump_json(exclude_unset=True).encode() + b"\n\n")


def one_line(event: bytes) -> bytes:
    """Escape what clients that split at Unicode's line ends would take for the end of the event's line."""
    for separator, escape in SEPARATORS:
        if separator in event:
            event = event.replace(separator, escape)
    return event


class Form:
    """A template for events that differ in a few values: encoded once, then only filled in.

    Args:
        body: the event, with a mark in place of each value that changes.
        marks: the marks in the order of the fields; each must be unique in the event.
        name: as in `event`.

    Raises:
        ValueError: a mark does not occur exactly once.
    """

    def __init__(self, body: BaseModel, *marks: object, name: str = "") -> None:
        self._form = event(body, name).replace(b"%", b"%%")
        for mark in map(to_json, marks):
            if self._form.count(mark) != 1:
                raise ValueError(f"{mark!r} is not there exactly once: {self._form!r}")
            self._form = self._form.replace(mark, b"%b")

    def event(self, *values: object) -> bytes:
        """The event with these values."""
        return one_line(self._form % tuple(map(to_json, values)))


async def unless_disconnected(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """Await work, and cancel it if the client disconnects. The request's body must have been read before.

    Raises:
        ClientGone: the client disconnected first.
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
    """Streams events. `close` is always called, even if the client disconnects before the first event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._close = close
        # Keeps proxies from buffering the stream into one late answer.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send(send, chunk_writer(scope)))
        except ClientGone:
            return
        finally:
            self._close()

    async def _send(self, send: Send, write: WriteChunk) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        num_sent = 0
        async for data in self._events:
            if not write(data):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            num_sent += 1
            # A backlog of events would be sent without yielding; let other tasks and a disconnect run in between.
            if num_sent % PAUSE_EVERY == 0:
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
