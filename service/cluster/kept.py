"""Leases that a gateway keeps for the next request, instead of asking Ray for another."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

KEPT_S = 0.5
"""How long a lease may wait in the gateway for its next request; half as long as it waits in the replica."""


class Placed(Protocol):
    """Of one replica."""

    @property
    def replica(self) -> str: ...


L = TypeVar("L", bound=Placed)


class KeptLeases(Generic[L]):
    """A gateway's leases: those in use, by replica, and those whose request has been answered.

    A lease from Ray costs 2 ms of a core in the gateway and as much in the replica. So one whose request has been
    answered is used again, if its replica is the best one for a request that comes soon.

    Args:
        now_s: the time.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._in_use: Counter[str] = Counter()
        self._kept: defaultdict[str, list[tuple[L, float]]] = defaultdict(list)

    @property
    def loads(self) -> Mapping[str, int]:
        """Leases in use, by replica; 0 of others."""
        return self._in_use

    def use(self, lease: L) -> L:
        """A new lease is used from now on."""
        self._in_use[lease.replica] += 1
        return lease

    def take(self, replica: str) -> L | None:
        """Use a lease of this replica again; None if none is kept that its replica still knows."""
        kept = self._kept[replica]
        if kept and kept[-1][1] + KEPT_S > self._now_s():
            return self.use(kept.pop()[0])
        # The others have waited for even longer.
        kept.clear()
        return None

    def done(self, lease: L, is_whole: bool) -> None:
        """A lease is no longer used. is_whole: its request has been answered in whole, so that it can be used again."""
        self._in_use[lease.replica] -= 1
        if is_whole:
            self._kept[lease.replica].append((lease, self._now_s()))

    def ended(self, lease: L) -> None:
        """The replica has ended a lease, or has ended itself."""
        kept = self._kept[lease.replica]
        kept[:] = [pair for pair in kept if pair[0] is not lease]
        if not kept and not self._in_use[lease.replica]:
            del self._kept[lease.replica], self._in_use[lease.replica]
