"""Messages over a stream socket: a length, then MessagePack.

The socket is one end of a pair shared by parent and child. It has no name, so no other process can connect, and either
side reads the end of the stream at once when the other exits for any reason.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from service.host.channel.messages import encode

T = TypeVar("T")

LENGTH = struct.Struct("<I")
BUFFER_BYTES = 4 << 20
"""Requested from the kernel, which may grant less: about a second of news from 256 streams."""

READ_BYTES = 1 << 18
MAX_BACKLOG_BYTES = 64 << 20
"""Most bytes that the other side may leave unread; beyond that it is treated as dead."""


class Frames(Generic[T]):
    """Decodes messages from a byte stream that arrives in parts of any size."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def push(self, data: bytes) -> list[T]:
        """Add data and return the messages that are now complete. Raises msgspec.DecodeError if one is not valid."""
        buffer = self._buffer
        buffer += data
        messages, at = [], 0
        with memoryview(buffer) as view:
            while len(buffer) - at >= LENGTH.size:
                (length,) = LENGTH.unpack_from(view, at)
                end = at + LENGTH.size + length
                if end > len(buffer):
                    break
                messages.append(self._decoder.decode(view[at + LENGTH.size : end]))
                at = end
        del buffer[:at]
        return messages


def framed(message: object) -> bytes:
    """Encode a message with its length."""
    content = encode(message)
    return LENGTH.pack(len(content)) + content


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, one for each process."""
    ends = socket.socketpair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return ends


class ThreadEnd(Generic[T]):
    """An end of the channel for threads: `send` never blocks, `read_all` and `take` read on the calling thread.

    Args:
        end: one socket of the pair.
        decoder: decodes the other side's messages.
        on_gone: called when the other side has left more than MAX_BACKLOG_BYTES unread.
    """

    def __init__(
        self, end: socket.socket, decoder: msgspec.msgpack.Decoder[T], on_gone: Callable[[], None] = lambda: None
    ) -> None:
        self._end = end
        self._frames = Frames(decoder)
        self._on_gone = on_gone
        self._readable = select.poll()
        self._readable.register(end, select.POLLIN)
        self._reading = threading.Lock()
        self._lock = threading.Lock()
        self._unsent: deque[memoryview] = deque()
        self._num_unsent = 0
        self._flusher: threading.Thread | None = None

    def send(self, message: object) -> None:
        """Send a message, or buffer it until earlier ones have been read. Does nothing if the other side has exited."""
        data = memoryview(framed(message))
        with self._lock:
            if not self._unsent:
                data = data[self._try(data) :]
            if not data:
                return
            self._unsent.append(data)
            self._num_unsent += len(data)
            if self._num_unsent > MAX_BACKLOG_BYTES:
                self._on_gone()
            if self._flusher is None:
                self._flusher = threading.Thread(target=self._flush, name="channel-flush", daemon=True)
                self._flusher.start()

    def read_one(self) -> T | None:
        """The first message, or None if the other side exits before. No second one may be sent until it is answered."""
        arrived: list[T] = []
        while not arrived:
            self._wait()
            if not self.take(arrived.append):
                return None
        return arrived[0]

    def read_all(self, receive: Callable[[T], None]) -> None:
        """Call `receive` with each message until the other side exits, but for those that others take by `take`."""
        self._wait()
        while self.take(receive):
            self._wait()

    def take(self, receive: Callable[[T], None]) -> bool:
        """Call `receive` with each message that has come, without waiting for one. False if the other side has exited.

        Any thread may call it while another one is in `read_all`; whoever reads first has the message, in its turn.
        """
        with self._reading:
            try:
                data = self._end.recv(READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                return False
            for message in self._frames.push(data):
                receive(message)
            return bool(data)

    def close(self) -> None:
        """Close the connection, so that the other side reads the end of the stream."""
        try:
            self._end.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _wait(self) -> None:
        """Wait until there is something to read, or the other side has exited. Reads nothing."""
        self._readable.poll()

    def _try(self, data: memoryview) -> int:
        """Send without blocking. Returns the number of bytes sent; all of them if the other side has exited."""
        try:
            return self._end.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def _flush(self) -> None:
        """Send the buffered bytes, blocking on the other side. Runs on its own thread until nothing is left."""
        while True:
            with self._lock:
                if not self._unsent:
                    self._flusher = None
                    return
                data = self._unsent[0]
            try:
                num_sent = self._end.send(data)
            except OSError:
                num_sent = len(data)
            with self._lock:
                self._num_unsent -= num_sent
                if num_sent == len(data):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = data[num_sent:]


class LoopEnd(asyncio.Protocol, Generic[T]):
    """An end of the channel for an event loop.

    Args:
        decoder: decodes the other side's messages.
        receive: called with each message.
        on_gone: called once, when the other side has exited.
    """

    def __init__(
        self, decoder: msgspec.msgpack.Decoder[T], receive: Callable[[T], None], on_gone: Callable[[], None]
    ) -> None:
        self._frames = Frames(decoder)
        self._receive = receive
        self._on_gone = on_gone
        self._transport: asyncio.Transport | None = None

    async def attach(self, end: socket.socket) -> None:
        """Start to read and write this socket."""
        end.setblocking(False)
        self._transport, _ = await asyncio.get_running_loop().create_connection(lambda: self, sock=end)

    def send(self, message: object) -> None:
        """Send a message, or buffer it until earlier ones have been read. Does nothing if the other side has exited."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(framed(message))

    def close(self) -> None:
        """Close the socket at once and discard unsent messages."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        for message in self._frames.push(data):
            self._receive(message)

    def connection_lost(self, _: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._on_gone()
