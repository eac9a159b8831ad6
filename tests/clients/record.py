"""Keeps what a client sends: an ASGI application in front of the app."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_CHARS = 100
NUM_SHOWN = 24


class Recorder:
    """`requests` holds path and body of every POST that succeeds, in order."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        sent = bytearray()
        statuses: list[int] = []

        async def kept() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        async def seen(message: Message) -> None:
            statuses.append(message.get("status", 0))
            await send(message)

        await self._app(scope, kept, seen)
        if statuses[0] == 200:
            self.requests.append({"path": scope["path"], "body": json.loads(sent)})


def shortened(value: Any) -> Any:
    """The same, with long texts cut: agents send pages of instructions, of which the shape alone matters here."""
    if isinstance(value, str):
        return value if len(value) <= MAX_CHARS else f"{value[:NUM_SHOWN]}... ({len(value)} characters)"
    if isinstance(value, list):
        return [shortened(each) for each in value]
    if isinstance(value, dict):
        return {name: shortened(each) for name, each in value.items()}
    return value
