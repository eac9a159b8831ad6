"""How long a replica keeps a lease."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from service.cluster.exchange import LEASE
from service.cluster.leases import Leased, Leases
from tests.support.harness import DEADLINE_S, until


def test_a_lease_ends_with_its_request() -> None:
    async def scenario() -> None:
        leases, go_on = Leases(idle_s=0.01), asyncio.Event()

        async def slow(_: Request) -> PlainTextResponse:
            await go_on.wait()
            return PlainTextResponse("done")

        app = Leased(Starlette(routes=[Route("/", slow)]), leases)
        with leases.open() as lease:
            over = asyncio.create_task(leases.over(lease))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica") as client:
                asked = asyncio.create_task(client.get("/", headers={LEASE: str(lease.number)}))
                await until(lambda: lease.num_requests == 1)
                await asyncio.sleep(0)
                assert not over.done()
                go_on.set()
                assert (await asked).text == "done"
            await asyncio.wait_for(over, DEADLINE_S)
        assert leases.find(str(lease.number)) is None

    asyncio.run(scenario())


def test_a_lease_may_have_one_request_after_the_other() -> None:
    async def scenario() -> None:
        leases = Leases(start_s=0.01, idle_s=5.0)
        app = Leased(Starlette(routes=[Route("/", lambda _: PlainTextResponse("done"))]), leases)
        with leases.open() as lease:
            over = asyncio.create_task(leases.over(lease))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica") as client:
                for _ in range(3):
                    assert (await client.get("/", headers={LEASE: str(lease.number)})).text == "done"
                    # Longer than the first one may take to come.
                    await asyncio.sleep(0.03)
                    assert not over.done()
            over.cancel()
            await asyncio.gather(over, return_exceptions=True)

    asyncio.run(scenario())


def test_a_lease_lasts_while_any_of_its_requests_does() -> None:
    async def scenario() -> None:
        leases = Leases(idle_s=0.01)
        with leases.open() as lease:
            over = asyncio.create_task(leases.over(lease))
            with lease.request():
                with lease.request():
                    await asyncio.sleep(0.03)
                await asyncio.sleep(0.03)
                assert not over.done()
            await asyncio.wait_for(over, DEADLINE_S)

    asyncio.run(scenario())


def test_a_request_that_comes_as_the_time_is_over_is_counted() -> None:
    async def scenario() -> None:
        leases, requests = Leases(start_s=0.01, idle_s=0.01), ExitStack()
        with leases.open() as lease:
            over = asyncio.create_task(leases.over(lease))
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.015, lambda: requests.enter_context(lease.request()))
            # Both are due in one turn of the loop, first the end of the time.
            time.sleep(0.03)
            await asyncio.sleep(0.03)
            assert lease.num_requests == 1
            assert not over.done()
            requests.close()
            await asyncio.wait_for(over, DEADLINE_S)

    asyncio.run(scenario())


def test_a_lease_whose_request_never_comes_ends_too() -> None:
    async def scenario() -> None:
        leases = Leases(start_s=0.01)
        with leases.open() as lease:
            assert leases.find(str(lease.number)) is lease
            await asyncio.wait_for(leases.over(lease), DEADLINE_S)
        assert leases.find(str(lease.number)) is None

    asyncio.run(scenario())


def test_requests_without_a_lease_are_served() -> None:
    async def scenario() -> None:
        app = Leased(Starlette(routes=[Route("/", lambda _: PlainTextResponse("done"))]), Leases())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica") as client:
            for number in (b"", b"1", b"x", b"-1", b"\xb2"):
                assert (await client.get("/", headers={LEASE.encode(): number})).text == "done"

    asyncio.run(scenario())
