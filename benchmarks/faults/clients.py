"""Clients that speak HTTP byte by byte, so that they see what really came, and can misbehave."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

LIMIT_S = 240.0
"""A client gives up after this: far above what any case takes."""

AFTER_ACCEPTANCE = frozenset({"engine_failed", "deadline_exceeded", "queue_timeout"})
"""Error codes of requests that had been taken; every other one is a refusal at the door."""

_EVENT = re.compile(rb"data: (.*?)\n\n", re.DOTALL)


class Kind(StrEnum):
    """How a request ended for its client."""

    ANSWERED = "answered"
    FAILED = "told of a fault"
    REFUSED = "refused"
    LEFT = "left"
    CUT = "cut off"
    SILENT = "no end"
    UNREACHED = "not connected"


@dataclass(frozen=True, slots=True)
class Question:
    """A greedy request of a fixed length."""

    prompt: str
    max_tokens: int
    variant: str = "w8a8"
    stream: bool = False

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "variant": self.variant,
            "stream": self.stream,
            "ignore_eos": True,
        }


@dataclass(frozen=True, slots=True)
class Seen:
    """What one client saw.

    code: of the error, or the finish reason.
    token_ids: of the answer; where it has no end, those that came.
    is_consistent: the stream's parts add up to its last event, and what has no end does not look as if it had one.
    """

    kind: Kind
    status: int | None = None
    code: str = ""
    token_ids: tuple[int, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    answer_id: str = ""
    is_consistent: bool = True

    def __str__(self) -> str:
        if self.kind in (Kind.LEFT, Kind.SILENT, Kind.UNREACHED, Kind.CUT):
            return self.kind
        begun = "200, then " if self.kind is Kind.FAILED and self.status == 200 else f"{self.status} "
        return begun + self.code


async def ask(
    port: int,
    question: Question | bytes,
    headers: Mapping[str, str] | None = None,
    leaves: Callable[[bytes], bool] | None = None,
    limit_s: float = LIMIT_S,
) -> Seen:
    """Send one request, given as such or as bytes, and read to its end.

    leaves: called with all that came so far; once it says True the client resets the connection and is gone.
    """
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return Seen(Kind.UNREACHED)
    received = bytearray()
    try:
        async with asyncio.timeout(limit_s):
            # The server may answer, and close, before it has read everything.
            with suppress(ConnectionError):
                writer.write(encoded(question, headers) if isinstance(question, Question) else question)
                await writer.drain()
                while chunk := await reader.read(1 << 16):
                    received += chunk
                    if leaves is not None and leaves(bytes(received)):
                        reset(writer)
                        return Seen(Kind.LEFT)
    except TimeoutError:
        return Seen(Kind.SILENT)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return parse(bytes(received))


def encoded(question: Question, headers: Mapping[str, str] | None = None) -> bytes:
    """The request as bytes, after whose answer the connection ends."""
    return posted(json.dumps(question.body).encode(), {"connection": "close", **(headers or {})})


def posted(content: bytes, headers: Mapping[str, str] | None = None, path: str = "/generate") -> bytes:
    """A POST of these bytes."""
    told = {"host": "localhost", "content-type": "application/json", "content-length": str(len(content))}
    lines = [f"{name}: {value}" for name, value in (told | dict(headers or {})).items() if value]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + content


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a client that crashed does."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def parse(received: bytes) -> Seen:
    """What the bytes of one connection say."""
    head, blank, rest = received.partition(b"\r\n\r\n")
    if not blank:
        return Seen(Kind.CUT)
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(status_line.split()[1])
    if headers.get("content-type", "").startswith("text/event-stream"):
        body, is_whole = dechunked(rest)
        return _streamed(status, headers, body, is_whole)
    if len(rest) != int(headers.get("content-length", "0")):
        return Seen(Kind.CUT, status, headers=headers)
    return _said(status, headers, json.loads(rest))


def dechunked(body: bytes) -> tuple[bytes, bool]:
    """The data of a chunked body, and whether its last chunk came."""
    data = b""
    while body:
        size, newline, rest = body.partition(b"\r\n")
        if not newline or len(rest) < int(size, 16) + 2:
            break
        if not int(size, 16):
            return data, True
        data, body = data + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return data, False


def _streamed(status: int, headers: Mapping[str, str], body: bytes, is_whole: bool) -> Seen:
    events = [bytes(found) for found in _EVENT.findall(body)]
    is_done = b"[DONE]" in body
    told = [json.loads(event) for event in events if event != b"[DONE]"]
    deltas = [event for event in told if "finish_reason" not in event and "error" not in event]
    came = tuple(token_id for delta in deltas for token_id in delta["token_ids"])
    last = told[-1] if told else {}
    if is_whole and "error" in last:
        error = last["error"]
        return Seen(Kind.FAILED, status, error["code"], came, headers, error["message"], is_consistent=not is_done)
    if not (is_whole and is_done and "finish_reason" in last):
        return Seen(Kind.CUT, status, "", came, headers, is_consistent=not is_done)
    is_consistent = came == tuple(last["token_ids"])
    return Seen(
        Kind.ANSWERED, status, last["finish_reason"], came, headers, answer_id=last["id"], is_consistent=is_consistent
    )


def _said(status: int, headers: Mapping[str, str], content: dict[str, Any]) -> Seen:
    if status != 200:
        error = content["error"]
        kind = Kind.FAILED if error["code"] in AFTER_ACCEPTANCE else Kind.REFUSED
        return Seen(kind, status, error["code"], (), headers, error["message"])
    ids = tuple(content["token_ids"])
    return Seen(Kind.ANSWERED, status, content["finish_reason"], ids, headers, answer_id=content["id"])
