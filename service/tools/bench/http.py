"""HTTP/1.1 responses and server-sent events, read as their bytes arrive, however the network splits them."""

from __future__ import annotations

from collections.abc import Callable

MAX_HEAD_BYTES = 65536


class BadResponse(Exception):
    """Bytes that are no HTTP/1.1 response."""


class Response:
    """One response. `status` is 0 until the head has come.

    is_complete: its end has come. can_reuse: its connection may take another request.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_complete = False
        self.can_reuse = False
        self._buffer = bytearray()
        self._left = 0
        self._is_between_chunks = False
        self._step: Callable[[list[bytes]], bool] = self._head

    def feed(self, data: bytes) -> bytes:
        """What these bytes add to the body.

        Raises:
            BadResponse: they are not HTTP/1.1.
        """
        if self._is_between_chunks and not self._buffer and (piece := _whole_chunk(data)):
            return piece
        self._buffer += data
        body: list[bytes] = []
        while not self.is_complete and self._step(body):
            pass
        return body[0] if len(body) == 1 else b"".join(body)

    def end(self) -> None:
        """The connection was closed. Completes a body that has neither a length nor chunks."""
        if self._step == self._until_closed:
            self.is_complete = True

    def _head(self, _body: list[bytes]) -> bool:
        at = self._buffer.find(b"\r\n\r\n")
        if at < 0:
            if len(self._buffer) > MAX_HEAD_BYTES or not b"HTTP/1.".startswith(self._buffer[:7]):
                raise BadResponse(bytes(self._buffer[:80]).decode("latin-1"))
            return False
        first, *lines = self._buffer[:at].decode("latin-1").split("\r\n")
        del self._buffer[: at + 4]
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise BadResponse(first[:80])
        status = int(words[1])
        if 100 <= status < 200:
            return True
        self.status = status
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        self.can_reuse = words[0] == "HTTP/1.1" and self.headers.get("connection", "").lower() != "close"
        self._begin_body()
        return True

    def _begin_body(self) -> None:
        length = self.headers.get("content-length", "")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._step, self._is_between_chunks = self._size, True
        elif self.status in (204, 304) or length == "0":
            self.is_complete = True
        elif length.isdigit():
            self._left, self._step = int(length), self._sized
        else:
            self.can_reuse, self._step = False, self._until_closed

    def _take(self, body: list[bytes]) -> bool:
        """Move up to _left bytes to the body. Returns whether all of them have come."""
        taken = self._buffer[: self._left]
        if taken:
            body.append(bytes(taken))
            del self._buffer[: len(taken)]
            self._left -= len(taken)
        return self._left == 0

    def _sized(self, body: list[bytes]) -> bool:
        self.is_complete = self._take(body)
        return False

    def _until_closed(self, body: list[bytes]) -> bool:
        self._left = len(self._buffer)
        self._take(body)
        return False

    def _size(self, _body: list[bytes]) -> bool:
        at = self._buffer.find(b"\r\n")
        if at < 0:
            return False
        line = bytes(self._buffer[:at])
        try:
            self._left = int(line.partition(b";")[0], 16)
        except ValueError as error:
            raise BadResponse(f"{line[:40]!r} is no size of a chunk") from error
        del self._buffer[: at + 2]
        self._step, self._is_between_chunks = self._chunk if self._left else self._trailer, False
        return True

    def _chunk(self, body: list[bytes]) -> bool:
        if not self._take(body) or len(self._buffer) < 2:
            return False
        if self._buffer[:2] != b"\r\n":
            raise BadResponse(f"{bytes(self._buffer[:2])!r} behind a chunk")
        del self._buffer[:2]
        self._step, self._is_between_chunks = self._size, True
        return True

    def _trailer(self, _body: list[bytes]) -> bool:
        at = self._buffer.find(b"\r\n")
        if at < 0:
            return False
        del self._buffer[: at + 2]
        self.is_complete = at == 0
        return True


def _whole_chunk(data: bytes) -> bytes:
    """The content of what is exactly one chunk, as nearly all of a stream's are; else nothing."""
    at = data.find(b"\r\n", 1, 10)
    if at < 0 or not data.endswith(b"\r\n"):
        return b""
    try:
        size = int(data[:at], 16)
    except ValueError:
        return b""
    return data[at + 2 : -2] if size and len(data) == at + 4 + size else b""


def _is_one_event(data: bytes) -> bool:
    """Whether this is one event of one line, as nearly all pieces of a stream are."""
    is_whole = data.startswith(b"data: ") and data.endswith(b"\n\n") and data.find(b"\n") == len(data) - 2
    return is_whole and b"\r" not in data


class Events:
    """The data of server-sent events. Lines end with LF or CRLF; a lone CR, which no server sends, ends none.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that these bytes complete."""
        if not self._buffer and not self._data and _is_one_event(data):
            return [data[6:-2]]
        events = []
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for ended in lines:
            line = ended.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
