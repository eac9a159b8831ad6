"""Keeps what a client sends: an ASGI application in front of the app."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Recorder:
    """`requests` holds path and body of every POST, in order."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        sent = bytearray()

        async def kept() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        await self._app(scope, kept, send)
        self.requests.append({"path": scope["path"], "body": json.loads(sent)})
