"""An HTTP server on loopback that answers as a script says, and a clock that only the script moves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


class Clock:
    """Seconds that stand still until a test sets them."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Asked:
    """A request, and the connection to answer it on. number: of all requests, from 0."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def event(self, data: object) -> None:
        """One server-sent event in a chunk of its own."""
        await self.write(chunk(data))

    async def reply(self, status: int, body: object, headers: str = "") -> None:
        content = json.dumps(body).encode()
        head = (
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n{headers}\r\n"
        )
        await self.write(head.encode() + content)

    def close(self) -> None:
        self.writer.close()


Script = Callable[[Asked], Awaitable[None]]


def chunk(data: object) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    event = f"data: {text}\n\n".encode()
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


def token(text: str = "x") -> dict[str, Any]:
    """An event of /v1/completions that brings a token."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


@dataclass
class Scripted:
    """The running server. asked: every request that came."""

    url: str
    asked: list[Asked] = field(default_factory=list)


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[Scripted]:
    """Serve until the end of the block; what is unanswered then is cut off."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode().rstrip().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split()
                asked = Asked(len(found.asked), method, path, headers, json.loads(content or b"{}"), writer)
                found.asked.append(asked)
                await script(asked)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found = Scripted(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield found
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
