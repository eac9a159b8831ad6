"""Parses requests at a cost that follows their bytes, and shares the event loop's time among connections."""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import h11
from h11._headers import CONTENT_LENGTH_MAX_DIGITS, Headers
from h11._readers import ChunkedReader, maybe_read_from_IDLE_client
from h11._receivebuffer import ReceiveBuffer

TURN_S = 0.002
"""Time for parsing between two turns of the event loop, all connections together."""

_NEXT_CHUNK = re.compile(rb"\r\n([0-9A-Fa-f]{1,20})(?:;[^\n]*|[ \t]*)\r\n")
"""The end of a chunk and the header of the next one, as h11 accepts it."""


_NAME, _VALUE = rb"[-0-9A-Za-z]+", rb"[!-~](?:[ -~]*[!-~])?"
_FIELDS = re.compile(rb"(%b): ?(%b)\r\n" % (_NAME, _VALUE))
_HEAD = re.compile(rb"(GET|POST) (/[!-~]*) HTTP/1\.1\r\n((?:%b: ?%b\r\n)+)\r\n" % (_NAME, _VALUE))
"""The head of a request that nothing is unusual about: what it leaves out, h11 reads."""

_UNUSUAL = frozenset({b"expect", b"transfer-encoding", b"upgrade"})
"""Headers that h11 must read itself."""


class PlainHeaders(Headers):
    """h11's headers, which are walked without a call for each of them."""

    __slots__ = ("_pairs",)

    def __init__(self, fields: list[tuple[bytes, bytes]]) -> None:
        self._pairs = [(name.lower(), value) for name, value in fields]
        super().__init__([(name, *pair) for (name, _), pair in zip(fields, self._pairs, strict=True)])

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self._pairs)


def read_head(buf: ReceiveBuffer) -> h11.Request | None:
    """h11's reader of a request's head, and a fast path for a plain one that has arrived as a whole.

    h11 takes a head apart line by line, with 17 calls for each.
    """
    # Only at the first look, so that a head that comes byte by byte is not searched once for each.
    if not buf._multiple_lines_search and (head := _HEAD.match(bytes(buf))) is not None:
        method, target, fields = head.groups()
        headers = PlainHeaders(_FIELDS.findall(fields))
        by_name = dict(headers)
        length = by_name.get(b"content-length", b"0")
        is_plain = len(by_name) == len(headers) and b"host" in by_name and by_name.keys().isdisjoint(_UNUSUAL)
        if is_plain and length.isdigit() and len(length) <= CONTENT_LENGTH_MAX_DIGITS:
            buf.maybe_extract_at_most(head.end())
            return h11.Request(method=method, target=target, headers=headers, http_version=b"1.1", _parsed=True)
    return maybe_read_from_IDLE_client(buf)


class ChunksReader(ChunkedReader):
    """h11's reader of a chunked body, which takes all chunks that have arrived as one.

    h11 makes an event of each chunk, which costs it 15 us, be it of one byte. Here a chunk costs 1 us.
    """

    def __call__(self, buf: ReceiveBuffer) -> h11.Data | h11.EndOfMessage | None:
        event = super().__call__(buf)
        if not isinstance(event, h11.Data) or not event.chunk_end or not buf:
            return event
        data, at, parts = bytes(buf), 0, [bytes(event.data)]
        while (header := _NEXT_CHUNK.match(data, at)) is not None:
            size, start = int(header[1], 16), header.end()
            # h11 reads the last chunk, which is empty, and one that has not arrived as a whole.
            if not size or start + size > len(data):
                break
            at = start + size
            parts.append(data[start:at])
        if at:
            buf.maybe_extract_at_most(at)
        return h11.Data(data=b"".join(parts), chunk_start=event.chunk_start, chunk_end=True)


def framed_chunk(data: bytes) -> bytes:
    """A chunk of a body as it is sent."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class QuickConnection(h11.Connection):
    """h11's connection with `read_head`, a `ChunksReader`, and a fast path that frames the chunks of an answer."""

    sends_chunks = False
    """Whether the body of an answer is being sent, in chunks."""

    def _get_io_object(self, role: Any, event: Any, io_dict: Any) -> Any:
        """Overrides how h11 chooses what reads a head or a body."""
        reader = super()._get_io_object(role, event, io_dict)
        if reader is maybe_read_from_IDLE_client:
            return read_head
        return ChunksReader() if type(reader) is ChunkedReader else reader

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """Overrides what h11's `send` calls."""
        if type(event) is h11.Data and event.data and self.sends_chunks:
            return [framed_chunk(event.data)]
        # Before h11, which raises on an event that comes out of turn.
        self.sends_chunks = self.sends_chunks and type(event) is h11.Data
        parts = super().send_with_data_passthrough(event)
        if type(event) is h11.Response:
            self.sends_chunks = b"\r\ntransfer-encoding: chunked\r\n" in b"".join(parts or ()).lower()
        return parts


class Parsed(Protocol):
    """A connection, as `ParsingTurns` uses it."""

    def parse(self) -> bool:
        """Parse a small part of what has arrived. Returns whether there is more. Raises nothing."""
        ...


class ParsingTurns:
    """Lets connections parse in turns, for at most TURN_S between two turns of the event loop.

    So however many of them send however much, everybody else waits for no more than that and one part.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._left_s = TURN_S
        self._queue: OrderedDict[Parsed, None] = OrderedDict()
        self._is_scheduled = False

    def add(self, connection: Parsed) -> None:
        """Let a connection parse what has arrived: now if there is time left in this turn, else after the others."""
        self._queue.setdefault(connection)
        self._run()

    def _run(self) -> None:
        while self._queue and self._left_s > 0:
            connection, _ = self._queue.popitem(last=False)
            start_s = self._clock()
            try:
                has_more = connection.parse()
            finally:
                self._left_s -= self._clock() - start_s
            if has_more:
                self._queue.setdefault(connection)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Begin a turn."""
        self._is_scheduled = False
        self._left_s = TURN_S
        if self._queue:
            self._run()
