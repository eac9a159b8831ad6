"""Streams that run while a server is stopped, and what became of each."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections import Counter
from collections.abc import Callable

import httpx

PROMPT = "Tell a long story about a lighthouse."


async def one_stream(client: httpx.AsyncClient, max_tokens: int) -> str:
    """What became of a streamed generation: done, refused, not reached, or lost after it was accepted."""
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    is_accepted = False
    try:
        async with client.stream("POST", "/generate", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                return f"refused {answer.status_code}"
            is_accepted = True
            text = "".join([part async for part in answer.aiter_text()])
    except httpx.TransportError as error:
        return f"lost: {error!r}" if is_accepted else "not reached"
    return "done" if "data: [DONE]" in text else f"lost: {text[-200:]!r}"


def stopped_under_load(
    url: str, start_stop: Callable[[], subprocess.Popen[bytes]], after_s: float
) -> tuple[Counter[str], float]:
    """Keep eight streams open, and stop the server after so many seconds. Returns outcomes and how long it took."""
    stopping: list[subprocess.Popen[bytes]] = []

    async def go() -> Counter[str]:
        is_over = lambda: bool(stopping) and stopping[0].poll() is not None  # noqa: E731
        load = asyncio.ensure_future(streams_until_refused(url, clients=8, max_tokens=48, is_over=is_over))
        await asyncio.sleep(after_s)
        stopping.append(start_stop())
        return await load

    started = time.monotonic()
    outcomes = asyncio.run(go())
    return outcomes, time.monotonic() - started - after_s


async def streams_until_refused(url: str, clients: int, max_tokens: int, is_over: Callable[[], bool]) -> Counter[str]:
    """Keep so many streams open, each followed by the next, until is_over. Returns the outcomes."""
    outcomes: Counter[str] = Counter()

    async def one_after_the_other() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
            while not is_over():
                outcome = await one_stream(client, max_tokens)
                outcomes[outcome] += 1
                if outcome != "done":
                    await asyncio.sleep(0.2)

    await asyncio.gather(*(one_after_the_other() for _ in range(clients)))
    return outcomes
