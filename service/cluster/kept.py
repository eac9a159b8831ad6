"""A gateway's leases: each is used by one request after the other, so that Ray is seldom asked for another."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from service.cluster.exchange import Unreachable
from service.cluster.leases import IDLE_IN_REPLICA_S
from service.errors import OttavaError, QueueFull, QueueTimeout

IDLE_IN_GATEWAY_S = IDLE_IN_REPLICA_S / 2
"""How long a lease may wait here for its next request. Its replica waits longer, since it hears of the end earlier."""

PATIENCE_S = 0.25
"""How long a request waits for the replica that suits it best; then any that it need not avoid will do."""

MAX_ASKING = 32
"""Most leases that Ray is asked for at a time."""

LEASE_S = 15.0, 25.0
"""How long a lease is used, at least and at most: those of a burst do not end together. Then its place goes back to
Ray, which gives places to other gateways, too."""

log = logging.getLogger(__name__)


class Placed(Protocol):
    """A place in one replica; see `service.cluster.exchange.Lease`. Its `done` calls that of `KeptLeases`."""

    @property
    def replica(self) -> str: ...

    def done(self, is_whole: bool) -> None: ...


L = TypeVar("L", bound=Placed)


@dataclass(slots=True, eq=False)
class Waiter(Generic[L]):
    """A request that waits for a lease. best: the replica that suits it best; None if none is known."""

    keys: Sequence[bytes]
    avoid: Set[str]
    best: str | None
    since_s: float
    granted: asyncio.Future[L]


class KeptLeases(Generic[L]):
    """The leases of a gateway: those in use, by replica, and those whose request has been answered.

    A lease from Ray costs 1.9 ms of a core in the gateway and 1.6 in the replica, so a few hundred a second are all
    that it can give. So a lease whose request has been answered is used again: by the request that has waited longest,
    or, if none waits that it suits, by the next one that comes soon. While requests wait, Ray is asked for as many
    leases as there are such requests, but for MAX_ASKING at most. A granted one goes to the request that it was asked
    for, or, if that has another by now, to the one that has waited longest.

    Args:
        ask: gets a lease from Ray for a request with these keys that avoids these replicas; see `Fleet.lease`. It is
            cancelled if it is no longer needed.
        best: the replica that a request with these keys and what it avoids should go to, by the load of each; None if
            none is known.
        serves: whether this replica takes requests.
        max_waiting: tells how many requests may wait.
        timeout_s: longest that one waits.
        now_s: the time.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[bytes], Set[str]], Awaitable[L]],
        best: Callable[[Sequence[bytes], Set[str], Mapping[str, int]], str | None],
        serves: Callable[[str], bool],
        *,
        max_waiting: Callable[[], int],
        timeout_s: float,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._best = best
        self._serves = serves
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._now_s = now_s
        self._in_use: Counter[str] = Counter()
        # Until when each may be used again.
        self._until_s: dict[L, float] = {}
        # Replica -> lease -> when its request ended, the oldest first.
        self._idle: dict[str, dict[L, float]] = {}
        # The oldest first.
        self._waiters: dict[Waiter[L], None] = {}
        # Also of those that have gone: whoever waits gets what was asked for them.
        self._asking: dict[Waiter[L], asyncio.Task[None]] = {}

    @property
    def loads(self) -> Mapping[str, int]:
        """Leases in use, by replica; 0 of others."""
        return self._in_use

    @property
    def num_idle(self) -> int:
        """Leases that are kept."""
        return sum(map(len, self._idle.values()))

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a lease."""
        return len(self._waiters)

    @property
    def num_asking(self) -> int:
        """Leases that Ray has been asked for and has not granted."""
        return len(self._asking)

    async def lease(self, keys: Sequence[bytes], avoid: Set[str]) -> L:
        """See `Fleet.lease`. The lease is in use until `done`.

        Raises:
            QueueFull: as many wait already as may.
            QueueTimeout: there was none for so long.
        """
        best = self._best(keys, avoid, self._in_use)
        lease = None if best is None else self._young(best)
        if lease is not None:
            self._in_use[lease.replica] += 1
            return lease
        if len(self._waiters) >= self._max_waiting():
            raise QueueFull(
                f"{len(self._waiters)} requests wait for a replica, which is the limit; send the request again later"
            )
        loop = asyncio.get_running_loop()
        waiter: Waiter[L] = Waiter(keys, avoid, best, self._now_s(), loop.create_future())
        self._waiters[waiter] = None
        self._ask_for_all(waiter)
        losing_patience = loop.call_later(PATIENCE_S, self._offer, waiter)
        try:
            async with asyncio.timeout(self._timeout_s):
                lease = await waiter.granted
        except TimeoutError as error:
            raise QueueTimeout(
                f"no replica had room for the request within {self._timeout_s:g} s; send it again later"
            ) from error
        finally:
            losing_patience.cancel()
            if lease is None:
                self._leave(waiter)
        return lease

    def done(self, lease: L, is_whole: bool) -> bool:
        """A lease is no longer used by its request. Returns whether it is kept; else its owner is to end it.

        is_whole: its request has been answered in whole.
        """
        self._in_use[lease.replica] -= 1
        is_young = self._now_s() < self._until_s.get(lease, 0.0)
        is_kept = is_whole and is_young and self._serves(lease.replica)
        suited = self._suited(lease.replica) if is_kept else None
        if suited is not None:
            self._give(lease, suited)
        elif is_kept:
            self._idle.setdefault(lease.replica, {})[lease] = self._now_s()
        else:
            self._until_s.pop(lease, None)
        self._prune(lease.replica)
        return is_kept

    def ended(self, lease: L) -> None:
        """The replica has ended a lease, or has ended itself."""
        self._until_s.pop(lease, None)
        self._idle.get(lease.replica, {}).pop(lease, None)
        self._prune(lease.replica)

    def _young(self, replica: str) -> L | None:
        """Take the youngest kept lease of this replica; None if there is none, or only too old ones."""
        idle = self._idle.get(replica)
        if not idle:
            return None
        lease, since_s = idle.popitem()
        self._prune(replica)
        return lease if since_s + IDLE_IN_GATEWAY_S > self._now_s() else None

    def _offer(self, waiter: Waiter[L]) -> None:
        """A waiter has lost its patience: any kept lease will do that it need not avoid."""
        for replica in [name for name in self._idle if name not in waiter.avoid and self._serves(name)]:
            lease = self._young(replica) if self._waits(waiter) else None
            if lease is not None:
                self._give(lease, waiter)

    def _waits(self, waiter: Waiter[L]) -> bool:
        """Whether it still waits. One whose client has left does not, although it has not yet been told."""
        return waiter in self._waiters and not waiter.granted.done()

    def _suited(self, replica: str) -> Waiter[L] | None:
        """The oldest waiter that this replica suits best, or that has lost its patience and need not avoid it."""
        impatient_s = self._now_s() - PATIENCE_S
        for waiter in self._waiters:
            may_go = waiter.best == replica or (waiter.since_s <= impatient_s and replica not in waiter.avoid)
            if may_go and self._waits(waiter):
                return waiter
        return None

    def _give(self, lease: L, waiter: Waiter[L]) -> None:
        """Let a waiter use a lease, and ask for no more than the others need."""
        del self._waiters[waiter]
        self._in_use[lease.replica] += 1
        waiter.granted.set_result(lease)
        self._ask_for_fewer()

    def _ask_for_all(self, *first: Waiter[L]) -> None:
        """Ask Ray for as many leases as may be asked for. first: whose turn it is, before the others."""
        num_wanted = min(len(self._waiters), MAX_ASKING)
        if len(self._asking) >= num_wanted:
            return
        for waiter in (*first, *self._waiters):
            if waiter not in self._asking and self._waits(waiter):
                self._asking[waiter] = asyncio.create_task(self._ask_for(waiter))
                if len(self._asking) >= num_wanted:
                    return

    def _ask_for_fewer(self) -> None:
        """Give up what was asked for requests that wait no more and is too much: Ray would hold places for nobody."""
        num_left = len(self._asking) - len(self._waiters)
        if num_left <= 0:
            return
        unneeded = [waiter for waiter in self._asking if waiter not in self._waiters]
        for waiter in unneeded[:num_left]:
            self._asking.pop(waiter).cancel()

    async def _ask_for(self, waiter: Waiter[L]) -> None:
        """Ask Ray on behalf of a waiter; a lease goes to the oldest one if that one has gone."""
        try:
            lease = await self._ask(waiter.keys, waiter.avoid)
        except Exception as error:
            self._asking.pop(waiter, None)
            if self._waits(waiter):
                del self._waiters[waiter]
                waiter.granted.set_exception(error)
            elif not isinstance(error, (OttavaError, Unreachable)):
                log.exception("a lease for a request that has gone")
        else:
            self._asking.pop(waiter, None)
            self._until_s[lease] = self._now_s() + random.uniform(*LEASE_S)  # noqa: S311 (no secret)
            self._grant(lease, waiter)
        self._ask_for_all()

    def _grant(self, lease: L, waiter: Waiter[L]) -> None:
        """Ray has granted a lease that was asked for on behalf of a waiter."""
        willing = (other for other in self._waiters if lease.replica not in other.avoid and self._waits(other))
        chosen = waiter if self._waits(waiter) else next(willing, None)
        if chosen is not None:
            self._give(lease, chosen)
        else:
            # Its replica would wait long for the first request.
            self._in_use[lease.replica] += 1
            lease.done(is_whole=False)

    def _leave(self, waiter: Waiter[L]) -> None:
        """A request no longer waits, because of an error or because its client has left."""
        self._waiters.pop(waiter, None)
        self._ask_for_fewer()
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            # In the very turn of the loop in which it left.
            granted.result().done(is_whole=True)

    def _prune(self, replica: str) -> None:
        if not self._idle.get(replica, True):
            del self._idle[replica]
        if not self._in_use[replica]:
            del self._in_use[replica]
