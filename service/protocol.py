"""HTTP/1.1 over one connection, with an end to everything a client can be slow at or send too much of."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.schemas import ErrorDetail, ErrorResponse


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How long and how many.

    receive_timeout_s: from a request's first byte, or from connecting, to the last byte of its body.
    send_timeout_s: for which bytes that were sent may stay unread.
    max_connections: that one server holds.
    """

    receive_timeout_s: float
    send_timeout_s: float
    max_connections: int


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol over h11, with what it leaves to a proxy: slow clients, too many of them, and error bodies.

    A transport buffers what the kernel does not take, and `pause_writing` tells when that is more than the high-water
    mark. The mark here is 0. So a pause means that a client has left the kernel's buffers full; the next `send` of
    the application waits from then on, and no more than one event is held in memory; and whoever does not catch up
    within send_timeout_s is cut off. Then the application's `receive` says http.disconnect, which frees the request.
    `close` would not do: it waits for the client to read.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{self._limits.max_connections} connections are open, which is the limit; try again later",
                "overloaded_error",
                [(b"retry-after", b"1")],
            )
            return
        self._watch_receiving()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_receiving()
        self._stop_sending()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_receiving()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Between two requests uvicorn's own clock runs, unless the next one has begun or this one goes on.
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._watch_receiving()
        else:
            self._stop_receiving()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._sending is None:
            self._sending = self.loop.call_later(self._limits.send_timeout_s, self._cut_off, "does not read")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_sending()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has too long a head, in the one shape of errors."""
        error = sys.exception()
        status = HTTPStatus(error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400)
        reason = f"invalid HTTP request: {str(error or msg).lower()}"
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            limit = self.config.h11_max_incomplete_event_size
            reason = f"the request's headers are longer than the limit of {limit} bytes; send fewer or shorter ones"
        self._refuse(status, reason, "invalid_request_error", [])

    def _watch_receiving(self) -> None:
        """Let the clock run until the request is here to its last byte."""
        is_on_its_way = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not is_on_its_way or self.transport.is_closing():
            self._stop_receiving()
        elif self._receiving is None:
            self._receiving = self.loop.call_later(
                self._limits.receive_timeout_s, self._cut_off, "does not send its request"
            )

    def _stop_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _cut_off(self, fault: str) -> None:
        self.logger.info("connection of %s cut off: the client %s", self.client, fault)
        self.transport.abort()

    def _refuse(self, status: HTTPStatus, message: str, kind: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer without the application, and close; an answer that has begun can only be cut off."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        code = status.phrase.lower().replace(" ", "_")
        error = ErrorResponse(error=ErrorDetail(message=message, type=kind, param=None, code=code))
        body = json.dumps(error.model_dump()).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
        response = h11.Response(
            status_code=status, headers=[*head, (b"connection", b"close")], reason=status.phrase.encode()
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
