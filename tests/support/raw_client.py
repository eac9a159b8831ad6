"""A client that opens a connection and may leave without a word."""

import asyncio
import json
from typing import Any


async def open_raw(
    port: int, body: dict[str, Any], path: str = "/generate"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {len(content)}\n\n"
    writer.write(head.replace("\n", "\r\n").encode() + content)
    await writer.drain()
    return reader, writer


async def leave_raw(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()
