"""A server without a model, to measure a load generator: all streams get a token together, once a step.

    python -m benchmarks.load.paced_server --port 8100 --step-ms 12.5

It speaks enough of /v1/completions for any client that streams. What a client measures beyond the step, and the time
its process takes, is the client's own. Once stopped, it prints how late its own steps were.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ID = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1700000000,
    "model": "paced",
}


def chunk(data: object) -> bytes:
    event = (
        b"data: " + (data if isinstance(data, bytes) else json.dumps(data, separators=(",", ":")).encode()) + b"\n\n"
    )
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


TOKEN = chunk(
    ID | {"choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None, "metrics": None}]}
)


class Streams:
    """All streams, which a step moves together."""

    def __init__(self) -> None:
        self.active: dict[asyncio.Transport, int] = {}
        self.asked: dict[asyncio.Transport, int] = {}
        self.late_s: list[float] = []

    def begin(self, transport: asyncio.Transport, num_tokens: int) -> None:
        self.active[transport] = self.asked[transport] = num_tokens

    def end(self, transport: asyncio.Transport) -> None:
        self.active.pop(transport, None)
        self.asked.pop(transport, None)

    async def run(self, step_s: float) -> None:
        due_s = time.perf_counter()
        while True:
            due_s = max(due_s + step_s, time.perf_counter())
            await asyncio.sleep(due_s - time.perf_counter())
            if self.active:
                self.late_s.append(time.perf_counter() - due_s)
            for transport, left in list(self.active.items()):
                self._move(transport, left)

    def _move(self, transport: asyncio.Transport, left: int) -> None:
        if left > 1:
            transport.write(TOKEN)
            self.active[transport] = left - 1
        else:
            usage = {"prompt_tokens": 1, "completion_tokens": self.asked[transport]}
            transport.write(TOKEN + chunk(ID | {"choices": [], "usage": usage}) + chunk(b"[DONE]") + b"0\r\n\r\n")
            del self.active[transport]


class Connection(asyncio.Protocol):
    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, body = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        lines = [line.lower() for line in head.split(b"\r\n")]
        length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
        if len(body) < length:
            return
        self._buffer = body[length:]
        self._answer(lines[0], json.loads(body[:length] or b"{}"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        if self._transport is not None:
            self._streams.end(self._transport)

    def _answer(self, first: bytes, body: dict[str, Any]) -> None:
        assert self._transport is not None
        if first.startswith(b"post"):
            self._transport.write(HEAD)
            self._streams.begin(self._transport, int(body.get("max_tokens", 16)))
            return
        content = json.dumps({"data": [{"id": "paced"}]}).encode()
        status = b"200 OK" if b"/v1/models" in first else b"404 Not Found"
        self._transport.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (status, len(content)) + content)


async def serve(port: int, step_s: float) -> None:
    streams, loop = Streams(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(streams), "127.0.0.1", port, backlog=4096)
    steps = asyncio.create_task(streams.run(step_s))
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
    steps.cancel()
    server.close()
    late = sorted(streams.late_s) or [0.0]
    p50, p99 = (1e3 * late[len(late) * q // 100] for q in (50, 99))
    print(f"{len(late)} steps, late by p50 {p50:.2f} ms, p99 {p99:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--step-ms", type=float, default=12.5)
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.step_ms / 1e3))


if __name__ == "__main__":
    main()
