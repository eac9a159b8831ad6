"""HTTP/1.1 over one connection, with limits on slow clients and on the number of connections."""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import struct
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import h11
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.web.chunks import WithChunks
from service.web.parsing import ParsingTurns, QuickConnection, framed_chunk
from service.web.schemas.failure import ErrorDetail, ErrorResponse

PART_BYTES = 8 << 10
"""Bytes that a connection parses at a time: 2 ms at worst, as chunks of one byte."""

REST_BYTES = 64 << 10
"""Most bytes of a request that are parsed after its answer to keep the connection; then it is closed."""

LINGER_BYTES = 16 << 20
"""Most bytes that are dropped unparsed after the last answer, so that their sender comes to read it."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of a connection.

    receive_timeout_s: from a request's first byte, or from connecting, to the last byte of its body, answered or not.
    send_timeout_s: how long a client may read nothing of what waits for it.
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


LOOKS = 4
_INT = struct.Struct("i")


class Inflow(FlowControl):
    """uvicorn's flow control, which does not resume the transport while received bytes wait to be parsed.

    Args:
        transport: the connection's.
        resume: called when the application wants more; returns whether the transport is to be read on.
    """

    def __init__(self, transport: asyncio.Transport, resume: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._resume = resume

    def resume_reading(self) -> None:
        """See uvicorn."""
        if self.read_paused:
            self.read_paused = False
            if self._resume():
                self._transport.resume_reading()


class ChunkWriter:
    """Writes chunks of a connection's answers, without the steps of `send` that only their ends need."""

    def __init__(self, connection: QuickConnection, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._connection = connection
        self._transport = transport
        self._flow = flow

    def write(self, data: bytes) -> bool:
        """See `WriteChunk`."""
        # An empty chunk would be the end of the body.
        if not data or self._flow.write_paused or not self._connection.sends_chunks or self._transport.is_closing():
            return False
        self._transport.write(framed_chunk(data))
        return True


class BoundedProtocol(H11Protocol):
    """uvicorn's h11 protocol plus what it leaves to a proxy: timeouts, a connection limit, and JSON error bodies.

    What has arrived is parsed in parts, in turn with other connections; the transport is not read on before.

    A transport buffers what the kernel does not accept, and calls `pause_writing` when that exceeds the high-water
    mark, here 0. So a pause means that the client has left the kernel's buffers full. From then on the application's
    next `send` waits, so at most one event is held in memory, and a client that reads nothing for send_timeout_s is
    aborted: the application's `receive` then returns http.disconnect, which frees the request. `close` would not work
    here, because it waits for the client to read.

    Nor would it work for a client that is answered before it has sent its whole request: closing a socket with unread
    bytes resets the connection, and a client that is still sending sees the reset instead of its answer. So only our
    sending side is closed, and further bytes are dropped until the client closes too, receive_timeout_s has passed or
    there were LINGER_BYTES of them.
    """

    conn: QuickConnection

    def __init__(self, *args: Any, limits: ConnectionLimits, turns: ParsingTurns, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._turns = turns
        assert self.config.h11_max_incomplete_event_size is not None, "set by server_config"
        self.conn = QuickConnection(h11.SERVER, self.config.h11_max_incomplete_event_size)
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._unparsed = bytearray()
        self._num_after_answer = 0
        self._num_dropped = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self._socket = transport
        self.flow = Inflow(transport, self._parse_on)
        self.transport = cast(asyncio.Transport, GentleTransport(transport, self._hang_up))
        self.app = WithChunks(cast(ASGIApp, self.app), ChunkWriter(self.conn, self.transport, self.flow).write)
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
            self._drop(len(data))
            return
        self._unparsed += data
        self._turns.add(self)
        if self._unparsed:
            self._socket.pause_reading()

    def parse(self) -> bool:
        """Parse a part of what has arrived. Returns whether more may be parsed now.

        Raises nothing: connections parse in each other's turns, and a fault of one must not cost the others theirs.
        """
        try:
            return self._parse_part()
        except Exception:
            self.logger.exception("connection of %s cut off: what it sent could not be parsed", self.client)
            self.transport.abort()
            return False

    def _parse_part(self) -> bool:
        if self.transport.is_closing():
            self._drop(len(self._unparsed))
            self._unparsed.clear()
            return False
        if self._unparsed and not self.flow.read_paused:
            part = bytes(self._unparsed[:PART_BYTES])
            del self._unparsed[:PART_BYTES]
            super().data_received(part)
            self._end_if_answered(len(part))
            self._watch_receiving()
        if not self._unparsed and not self.flow.read_paused:
            self._socket.resume_reading()
        return bool(self._unparsed) and not self.flow.read_paused

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        # Between requests uvicorn's keep-alive timer runs; ours runs if this request or the next one is incomplete.
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0] or self._unparsed:
            self._watch_receiving()
        else:
            self._stop_receiving()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._sending is None:
            self._watch_sending()

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

    def _parse_on(self) -> bool:
        """Go on with what has arrived. Returns whether all of it is parsed, so that more can be read."""
        if not self._unparsed:
            return True
        self._turns.add(self)
        return False

    def _end_if_answered(self, num_bytes: int) -> None:
        """Hang up on a client that goes on sending a request that has been answered."""
        is_behind = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        self._num_after_answer = self._num_after_answer + num_bytes if is_behind else 0
        if self._num_after_answer > REST_BYTES:
            self.transport.close()

    def _drop(self, num_bytes: int) -> None:
        self._num_dropped += num_bytes
        if self._num_dropped > LINGER_BYTES:
            self._cut_off("sends on after its last answer")

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

    def _watch_sending(self, num_before: float = math.inf, num_idle: int = 0) -> None:
        """Look LOOKS times per send_timeout_s whether the client has read, and cut it off if not once."""
        num_left = self._num_unread()
        num_idle = num_idle + 1 if num_left >= num_before else 0
        if num_idle == LOOKS:
            self._cut_off("does not read")
        else:
            delay_s = self._limits.send_timeout_s / LOOKS
            self._sending = self.loop.call_later(delay_s, self._watch_sending, num_left, num_idle)

    def _num_unread(self) -> int:
        """Bytes that the client's machine has not acknowledged, the kernel's and the transport's."""
        descriptor = self._socket.get_extra_info("socket").fileno()
        (in_kernel,) = _INT.unpack(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(_INT.size)))
        return int(in_kernel) + self._socket.get_write_buffer_size()

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _hang_up(self) -> None:
        """Close the connection, or only our sending side if the client is still sending."""
        if self.conn.their_state in (h11.SEND_BODY, h11.ERROR) and self._socket.can_write_eof():
            try:
                self._socket.write_eof()
            except OSError:
                # The client has left already, which the event loop has not read yet.
                self._socket.abort()
                return
            self._drop(len(self._unparsed))
            self._unparsed.clear()
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
