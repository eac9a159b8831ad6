"""A deployment behind Ray's HTTP proxy that passes a replica's events on, one by one: the way not taken.

    python -m benchmarks.cluster_relay URL PORT

Starts a Ray of its own, and serves until it is stopped; see `benchmarks.cluster`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator

import aiohttp
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse


class Relay:
    """Asks one replica over HTTP; each event goes on as one message of Ray's."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __call__(self, request: Request) -> StreamingResponse:
        """See POST /generate."""
        return StreamingResponse(self._events(await request.body()), media_type="text/event-stream")

    async def _events(self, body: bytes) -> AsyncIterator[bytes]:
        headers = {"content-type": "application/json"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self._url}/generate", data=body, headers=headers) as answer,
        ):
            async for chunk in answer.content.iter_any():
                yield chunk


def main() -> None:
    url, port = sys.argv[1], int(sys.argv[2])
    ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(
        serve.deployment(Relay).options(ray_actor_options={"num_cpus": 0}).bind(url), name="relay", route_prefix="/"
    )
    done = asyncio.Event()

    async def wait() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, done.set)
        await done.wait()

    asyncio.run(wait())
    serve.delete("relay")


if __name__ == "__main__":
    main()
