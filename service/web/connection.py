"""HTTP/1.1 over one connection, with an end to everything a client can be slow at or send too much of."""

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
    """How long and how many.

    receive_timeout_s: from a request's first byte, or from connecting, to the last byte of its body, answered or not.
    send_timeout_s: for which bytes that were sent may stay unread.
    max_connections: that one server holds.
    """

    receive_timeout_s: float
    send_timeout_s: float
    max_connections: int


class GentleTransport:
    """A transport whose `close` is carried out by its owner, and which counts as closing from then on.

    Args:
        inner: the transport itself, which does everything else.
        hang_up: what `close` does.
    """

    def __init__(self, inner: asyncio.Transport, hang_up: Callable[[], None]) -> None:
        self._inner = inner
        self._hang_up = hang_up
        self._is_hung_up = False
        # Called for every event; found as an attribute of its own, it is not looked for first.
        self.write = inner.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def close(self) -> None:
        """Hang up. A second call changes nothing."""
        if not self.is_closing():
            self._is_hung_up = True
            self._hang_up()

    def is_closing(self) -> bool:
        return self._is_hung_up or self._inner.is_closing()


class QuickConnection(h11.Connection):
    """h11's, but for the chunks of a body: there nothing is left to decide, and they are framed at once."""

    _is_chunked = False

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """What `send` calls."""
        if type(event) is h11.Data and event.data and self._is_chunked and self.our_state is h11.SEND_BODY:
            return [b"%x\r\n" % len(event.data), event.data, b"\r\n"]
        parts = super().send_with_data_passthrough(event)
        if type(event) is h11.Response:
            self._is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in b"".join(parts or ()).lower()
        return parts


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol over h11, with what it leaves to a proxy: slow clients, too many of them, and error bodies.

    A transport buffers what the kernel does not take, and `pause_writing` tells when that is more than the high-water
    mark. The mark here is 0. So a pause means that a client has left the kernel's buffers full; the next `send` of
    the application waits from then on, and no more than one event is held in memory; and whoever does not catch up
    within send_timeout_s is cut off. Then the application's `receive` says http.disconnect, which frees the request.
    `close` would not do: it waits for the client to read.

    Nor would it do for whoever is answered before the request is here to its end: a socket that is closed while bytes
    wait in it resets the connection, and a client that is still sending finds that in place of its answer. So our side
    alone ends, and what still comes is dropped until the client closes too, or receive_timeout_s is over.
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

    def shutdown(self) -> None:
        """The server ends: it does not wait for clients that go on sending after their answer."""
        if self.transport.is_closing():
            self._socket.close()
        else:
            super().shutdown()

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
        """Close; where the client is still sending, our side alone."""
        if self.conn.their_state in (h11.SEND_BODY, h11.ERROR) and self._socket.can_write_eof():
            self._socket.write_eof()
            self._socket.resume_reading()
            # The clock of the request goes on: whoever never stops sending is cut off by it.
            self._start_receiving()
        else:
            self._socket.close()

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
