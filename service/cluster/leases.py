"""Leases as a replica keeps them: one for each request that it has been promised, until it has answered it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.cluster.exchange import LEASE

START_S = 10.0
"""Time for a leased request to arrive. A gateway that has died sends none."""


class Leases:
    """The open leases of one replica.

    Ray counts a call that has not ended as an ongoing request: so a call that lasts as long as its lease is what
    autoscaling, `max_ongoing_requests` and the drain of a replica go by, while the answer itself takes no way through
    Ray.
    """

    def __init__(self, start_s: float = START_S) -> None:
        self._start_s = start_s
        self._numbers = itertools.count(1)
        self._open: dict[int, Lease] = {}

    @contextmanager
    def open(self) -> Iterator[Lease]:
        """A new lease, found by its number within the context; wait there for its end with `over`."""
        lease = Lease(next(self._numbers))
        self._open[lease.number] = lease
        try:
            yield lease
        finally:
            del self._open[lease.number]

    async def over(self, lease: Lease) -> None:
        """Wait until the lease's request is answered, or for START_S if it does not come."""
        with suppress(TimeoutError):
            await asyncio.wait_for(lease.begun.wait(), self._start_s)
        if lease.begun.is_set():
            await lease.ended.wait()

    def find(self, number: str | None) -> Lease | None:
        """The open lease with this number, as its header has it."""
        return self._open.get(int(number)) if number is not None and number.isascii() and number.isdecimal() else None


class Lease:
    """One request's lease."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()


class Leased:
    """Middleware that ends a request's lease once the application has answered it, or its connection is gone."""

    def __init__(self, app: ASGIApp, leases: Leases) -> None:
        self._app = app
        self._leases = leases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lease = self._leases.find(Headers(scope=scope).get(LEASE)) if scope["type"] == "http" else None
        if lease is None:
            await self._app(scope, receive, send)
            return
        lease.begun.set()
        try:
            await self._app(scope, receive, send)
        finally:
            lease.ended.set()
