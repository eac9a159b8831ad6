"""Leases as a replica keeps them: one for each request that it has been promised, until no other comes after it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.cluster.exchange import LEASE

START_S = 10.0
"""Time for a leased request to arrive. A gateway that has died sends none."""

IDLE_IN_REPLICA_S = 1.0
"""Time for the next one: the gateway may use a lease again, see `service.cluster.kept`."""


class Leases:
    """The open leases of one replica.

    Ray counts a call that has not ended as an ongoing request: so a call that lasts as long as its lease is what
    autoscaling, `max_ongoing_requests` and the drain of a replica go by, while the answer itself takes no way through
    Ray.
    """

    def __init__(self, start_s: float = START_S, idle_s: float = IDLE_IN_REPLICA_S) -> None:
        self._start_s = start_s
        self._idle_s = idle_s
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
        """Wait until the lease's requests are answered and no other comes in time: start_s for the first, idle_s."""
        while True:
            lease.changed.clear()
            wait_s = None if lease.num_requests else self._idle_s if lease.has_begun else self._start_s
            try:
                await asyncio.wait_for(lease.changed.wait(), wait_s)
            except TimeoutError:
                # A request may have come in the very turn of the loop in which the time was over.
                if not lease.changed.is_set():
                    return

    def find(self, number: str | None) -> Lease | None:
        """The open lease with this number, as its header has it."""
        return self._open.get(int(number)) if number is not None and number.isascii() and number.isdecimal() else None


class Lease:
    """A place for one request at a time."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.num_requests = 0
        self.has_begun = False
        self.changed = asyncio.Event()

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request has come, and is answered with the context."""
        self.num_requests += 1
        self.has_begun = True
        self.changed.set()
        try:
            yield
        finally:
            self.num_requests -= 1
            self.changed.set()


class Leased:
    """Middleware that counts a request in its lease until the application has answered it or its connection is gone."""

    def __init__(self, app: ASGIApp, leases: Leases) -> None:
        self._app = app
        self._leases = leases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lease = self._leases.find(Headers(scope=scope).get(LEASE)) if scope["type"] == "http" else None
        if lease is None:
            await self._app(scope, receive, send)
            return
        with lease.request():
            await self._app(scope, receive, send)
