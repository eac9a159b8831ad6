"""An ASGI extension by which an answer writes a chunk of its body at once, past the layers of `send`.

A stream's event passes five coroutines on its way from `send` to the connection; none of them looks at a body. For 256
streams they are a tenth of what the event loop has to do.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

EXTENSION = "ottava.chunks"

WriteChunk = Callable[[bytes], bool]
"""Writes a chunk. Returns False if it has written nothing: then the chunk has to go through `send`, which waits until
the client has read, or knows that it has left."""


class WithChunks:
    """Adds the extension to the scope of every request but HEAD, whose answer has no body.

    write: of the connection that they come from.
    """

    def __init__(self, app: ASGIApp, write: WriteChunk) -> None:
        self._app = app
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            scope["extensions"] = {EXTENSION: self._write}
        await self._app(scope, receive, send)


def chunk_writer(scope: Scope) -> WriteChunk:
    """The writer of a request's connection; of one without the extension a writer that writes nothing."""
    writer: WriteChunk = scope.get("extensions", {}).get(EXTENSION, _nowhere)
    return writer


def _nowhere(_: bytes) -> bool:
    return False
