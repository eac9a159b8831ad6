"""A small HTTP/1.1 client for many streams at once: every piece of an answer is noted with the time it came.

What is ready in one turn of the event loop is first read from all sockets and stamped, and parsed after that, so that
the stamps of 256 streams that move together do not wait for each other's JSON.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from service.errors import BenchError, InvalidSettings
from service.tools.bench.http import BadResponse, Response

REFUSED, CUT, TIMEOUT, MALFORMED = "not connected", "cut off", "timeout", "malformed"
"""How a request can fail beside what the server says."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address, and the headers that every request carries. The key is in no repr."""

    url: str
    host: str
    port: int
    base: str
    is_tls: bool
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Target:
        """The server at url, which may have a path and may end in /v1.

        Raises:
            InvalidSettings: url is no http or https address, or the key is not printable. No message has the key.
        """
        parts = urlsplit(url)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise InvalidSettings(f"--url {url!r} is no address of a server; write it as http://127.0.0.1:8000")
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise InvalidSettings(
                "the API key has characters that no header may have; is it the right variable or file?"
            )
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(url.rstrip("/"), parts.hostname, port, base, parts.scheme == "https", key)

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """A GET, or a POST of the body as JSON, in bytes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{'GET' if body is None else 'POST'} {self.base}{path} HTTP/1.1", f"Host: {host}:{self.port}"]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        content = b"" if body is None else msgspec.json.encode(body)
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


class Exchange:
    """One request and its answer.

    read: called with each piece of a body of status 200, and when it came; other bodies are kept in `body`.
    done: is set when it is over. failure: kind and detail, None if the response came to its end.
    """

    def __init__(self, request: bytes, read: Callable[[bytes, float], None] | None = None) -> None:
        self.request = request
        self.response = Response()
        self.body = b""
        self.failure: tuple[str, str] | None = None
        self.end_s: float | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connection: Connection | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.has_answer = False
        self._read = read

    def feed(self, data: bytes, now_s: float) -> None:
        """Raises BadResponse if this is not HTTP."""
        self.has_answer = True
        piece = self.response.feed(data)
        if piece and self._read is not None and self.response.status == 200:
            self._read(piece, now_s)
        else:
            self.body += piece

    def end(self, now_s: float, failure: tuple[str, str] | None = None) -> None:
        """It is over; only the first call counts."""
        if self.done.done():
            return
        self.failure, self.end_s = failure, now_s
        if self.timer is not None:
            self.timer.cancel()
        self.done.set_result(None)


class Connection(asyncio.Protocol):
    """One connection: hands on what comes, with its time, and parses it only when asked to."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._exchange: Exchange | None = None
        self._num_taken = 0
        self.transport: asyncio.Transport | None = None

    @property
    def is_open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._client.note(self, data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        self._client.note(self, None)

    def start(self, exchange: Exchange) -> None:
        assert self.transport is not None
        self._exchange, exchange.connection = exchange, self
        self._num_taken += 1
        self.transport.write(exchange.request)

    def take(self, data: bytes | None, now_s: float) -> None:
        """Parse what came; data: None when the connection was closed."""
        exchange = self._exchange
        if exchange is None:
            # Closed while idle, or bytes that nobody asked for.
            self._client.forget(self)
            return
        if data is None:
            self._lost(exchange, now_s)
            return
        try:
            exchange.feed(data, now_s)
        except (BadResponse, msgspec.DecodeError) as error:
            self.abort()
            exchange.end(now_s, (MALFORMED, str(error)))
            return
        if exchange.response.is_complete:
            self._exchange = None
            self._client.give_back(self, exchange.response.can_reuse)
            exchange.end(now_s)

    def abort(self) -> None:
        self._exchange = None
        if self.transport is not None:
            self.transport.abort()

    def _lost(self, exchange: Exchange, now_s: float) -> None:
        self._exchange = None
        exchange.response.end()
        if exchange.response.is_complete:
            exchange.end(now_s)
        elif self._num_taken > 1 and not exchange.has_answer:
            # A server may close an idle connection just when the next request is on its way.
            self._client.send_anew(exchange)
        else:
            exchange.end(now_s, (CUT, "the server closed the connection before the end of its answer"))


class Client:
    """Connections to one server, kept open between requests.

    timeout_s: from sending a request to the end of its answer. clock: for stamps.
    """

    def __init__(self, target: Target, timeout_s: float, clock: Clock = time.perf_counter) -> None:
        self.target = target
        self.clock = clock
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._ssl = ssl.create_default_context() if target.is_tls else None
        self._idle: list[Connection] = []
        self._news: list[tuple[Connection, float, bytes | None]] = []
        self._connecting: set[asyncio.Task[None]] = set()

    async def open(self, count: int) -> None:
        """Open so many connections ahead, so that a burst finds them.

        Raises:
            BenchError: the server is not there.
        """
        try:
            opened = await asyncio.gather(*(self._connect() for _ in range(count - len(self._idle))))
        except (OSError, ssl.SSLError) as error:
            raise BenchError(unreachable(self.target, str(error))) from error
        self._idle += opened

    def send(self, exchange: Exchange) -> None:
        """Send a request; returns at once. Its answer, or failure, ends `exchange.done`."""
        exchange.timer = self._loop.call_later(self._timeout_s, self._time_out, exchange)
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                connection.start(exchange)
                return
        self.send_anew(exchange)

    def send_anew(self, exchange: Exchange) -> None:
        """Send a request on a new connection."""
        task = self._loop.create_task(self._connect_and_start(exchange))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def get(self, path: str) -> Exchange:
        """One GET, to its end."""
        return await self.ask(Exchange(self.target.request(path)))

    async def ask(self, exchange: Exchange) -> Exchange:
        """Send, and wait for the end."""
        self.send(exchange)
        await exchange.done
        return exchange

    def note(self, connection: Connection, data: bytes | None) -> None:
        """Stamp what came; it is parsed once all that is ready in this turn of the event loop has been read."""
        if not self._news:
            self._loop.call_soon(self._parse)
        self._news.append((connection, self.clock(), data))

    def give_back(self, connection: Connection, can_reuse: bool) -> None:
        if can_reuse and connection.is_open:
            self._idle.append(connection)
        elif connection.transport is not None:
            connection.transport.close()

    def forget(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.transport is not None:
            connection.transport.abort()

    async def close(self) -> None:
        """Close every idle connection, and give up those that are being opened."""
        for task in self._connecting:
            task.cancel()
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
        # Transports close in the next turn.
        await asyncio.sleep(0)

    def _parse(self) -> None:
        news, self._news = self._news, []
        for connection, now_s, data in news:
            connection.take(data, now_s)

    async def _connect(self) -> Connection:
        target = self.target
        _, connection = await self._loop.create_connection(
            lambda: Connection(self), target.host, target.port, ssl=self._ssl
        )
        return connection

    async def _connect_and_start(self, exchange: Exchange) -> None:
        try:
            connection = await self._connect()
        except OSError as error:
            exchange.end(self.clock(), (REFUSED, str(error)))
            return
        if exchange.done.done():
            # It timed out meanwhile.
            self.give_back(connection, can_reuse=True)
        else:
            connection.start(exchange)

    def _time_out(self, exchange: Exchange) -> None:
        connection = exchange.connection
        exchange.end(self.clock(), (TIMEOUT, f"no end of the answer within {self._timeout_s:g} s"))
        if connection is not None:
            connection.abort()


def unreachable(target: Target, why: str) -> str:
    """What to tell the user when no server is there."""
    return (
        f"no server answers at {target.url} ({why or 'no connection'}): start one with `ottava serve`, or say where it "
        "is with --url"
    )
