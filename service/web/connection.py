"""HTTP/1.1 over one connection, with limits on slow clients and on the number of connections."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.web.schemas.failure import ErrorDetail, ErrorResponse


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of a connection.

    receive_timeout_s: from a request's first byte, or from connecting, to the last byte of its body, answered or not.
    send_timeout_s: how long sent bytes may stay unread.
    max_connections: most connections of one server.
    """

    receive_timeout_s: float
    send_timeout_s: float
    max_connections: int


class GentleTransport:
    """A transport that delegates `close` to its owner, and reports `is_closing` from then on.

    Args:
        inner: the transport that does everything else.
        hang_up: called by `close`.
    """

    def __init__(self, inner: asyncio.Transport, hang_up: Callable[[], None]) -> None:
        self._inner = inner
        self._hang_up = hang_up
        self._is_hung_up = False
        # Called for every event; as an instance attribute it is found without `__getattr__`.
        self.write = inner.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def close(self) -> None:
        """Hang up. Idempotent."""
        if not self.is_closing():
            self._is_hung_up = True
            self._hang_up()

    def is_closing(self) -> bool:
        return self._is_hung_up or self._inner.is_closing()


class QuickConnection(h11.Connection):
    """h11's connection with a fast path that frames the chunks of a body directly."""

    _is_chunked = False

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """Overrides what h11's `send` calls."""
        if type(event) is h11.Data and event.data and self._is_chunked and self.our_state is h11.SEND_BODY:
            return [b"%x\r\n" % len(event.data), event.data, b"\r\n"]
        parts = super().send_with_data_passthrough(event)
        if type(event) is h11.Response:
            self._is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in b"".join(parts or ()).lower()
        return parts


class BoundedProtocol(H11Protocol):
    """uvicorn's h11 protocol plus what it leaves to a proxy: timeouts, a connection limit, and JSON error bodies.

    A transport buffers what the kernel does not accept, and calls `pause_writing` when that exceeds the high-water
    mark, here 0. So a pause means that the client has left the kernel's buffers full. From then on the application's
    next `send` waits, so at most one event is held in memory, and a client that does not catch up within
    send_timeout_s is aborted: the application's `receive` then returns http.disconnect, which frees the request.
    `close` would not work here, because it waits for the client to read.

    Nor would it work for a client that is answered before it has sent its whole request: closing a socket with unread
    bytes resets the connection, and a client that is still sending sees the reset instead of its answer. So only our
    sending side is closed, and further bytes are dropped until the client closes too or receive_timeout_s has passed.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        assert self.config.h11_max_incomplete_event_size is not None, "set by server_config"
        self.conn = QuickConnection(h11.SERVER, self.config.h11_max_incomplete_event_size)
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self._socket = transport
        self.transport = cast(asyncio.Transport, GentleTransport(transport, self._hang_up))
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
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_receiving()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        # Between requests uvicorn's keep-alive timer runs; ours runs if this request or the next one is incomplete.
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

    def shutdown(self) -> None:
        """Close on server shutdown, without waiting for clients that still send after their answer."""
        if self.transport.is_closing():
            self._socket.close()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP, or headers that are too long, with a JSON error."""
        error = sys.exception()
        status = HTTPStatus(error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400)
        reason = f"invalid HTTP request: {str(error or msg).lower()}"
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            limit = self.config.h11_max_incomplete_event_size
            reason = f"the request's headers are longer than the limit of {limit} bytes; send fewer or shorter ones"
        self._refuse(status, reason, "invalid_request_error", [])

    def _watch_receiving(self) -> None:
        """Run the receive timer while a request is incomplete."""
        is_on_its_way = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if self.transport.is_closing():
            return
        if is_on_its_way:
            self._start_receiving()
        else:
            self._stop_receiving()

    def _start_receiving(self) -> None:
        if self._receiving is None:
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

    def _hang_up(self) -> None:
        """Close the connection, or only our sending side if the client is still sending."""
        if self.conn.their_state in (h11.SEND_BODY, h11.ERROR) and self._socket.can_write_eof():
            self._socket.write_eof()
            self._socket.resume_reading()
            # Bounds how long the client may go on sending.
            self._start_receiving()
        else:
            self._socket.close()

    def _cut_off(self, fault: str) -> None:
        self.logger.info("connection of %s cut off: the client %s", self.client, fault)
        self.transport.abort()

    def _refuse(self, status: HTTPStatus, message: str, kind: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer without the application, and close. Aborts if a response has already begun."""
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
