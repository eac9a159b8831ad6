"""The outermost middleware: a record and an id for every request, and headers for every answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.telemetry.record import RequestRecord, current

REQUEST_ID = "x-request-id"
MAX_REQUEST_ID_CHARS = 128
TRACE_HEADERS = ("traceparent", "tracestate")

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
}
"""Defaults that a route may override; they forbid other sites to sniff, frame or embed answers."""


class Envelope:
    """Creates the record of every request, sets its id and the security headers.

    on_start, on_end: called with the record when the request has arrived, and after its answer was sent.

    A client's own id is kept if it is short and printable, so that one search finds a request in the logs of both.
    """

    def __init__(
        self,
        app: ASGIApp,
        on_end: Sequence[Callable[[RequestRecord], None]],
        on_start: Sequence[Callable[[RequestRecord], None]] = (),
    ) -> None:
        self._app = app
        self._on_start = on_start
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _record(scope)
        for begin in self._on_start:
            begin(record)
        scope.setdefault("state", {}).update(record=record, received_s=record.received_s, request_id=record.id)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = record.id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        token = current.set(record)
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            current.reset(token)
            record.ended_s = time.perf_counter()
            record.route = getattr(scope.get("route"), "path", record.route)
            for tell in self._on_end:
                tell(record)


def _record(scope: Scope) -> RequestRecord:
    headers = Headers(scope=scope)
    trace = {name: value for name in TRACE_HEADERS if (value := headers.get(name)) is not None}
    server = scope.get("server") or ("unknown", None)
    request_id = _request_id(headers.get(REQUEST_ID))
    return RequestRecord(request_id, scope["method"], scope["path"], scope["scheme"], tuple(server), trace)


def _request_id(given: str | None) -> str:
    """The client's id if it is short and printable, or a new one."""
    is_sane = given is not None and 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable()
    return given if is_sane and given is not None else uuid4().hex
