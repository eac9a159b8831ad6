"""The replicas as the routers of this process last heard of them from Ray, and which prompts each has been sent.

Ray runs routers on a thread of its own; gateways ask from theirs.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Protocol
from weakref import ReferenceType, ref

from service.cluster.prefixes import KnownPrefixes, ranked

KNOWN = KnownPrefixes()
"""Prefixes of the prompts that this process has sent."""


class Source(Protocol):
    """A router.

    bound: see `ranked`.
    max_waiting: most requests that may wait for a replica.
    """

    @property
    def bound(self) -> int: ...

    @property
    def max_waiting(self) -> int: ...

    def urls(self) -> Mapping[str, str]:
        """Name -> URL of the replicas that it knows."""
        ...


# Of the routers and not of their methods: whenever Ray reads a deployment's configuration again it gives the router's
# class new functions, and the old ones are gone.
_sources: list[ReferenceType[Source]] = []


def register(source: Source) -> None:
    """Add a router; it is dropped with its last other reference."""
    _sources.append(ref(source))


def _alive() -> list[Source]:
    """The routers that have another reference; the others are dropped."""
    found: list[Source] = []
    for weak in list(_sources):
        source = weak()
        if source is None:
            _sources.remove(weak)
        else:
            found.append(source)
    return found


def urls() -> dict[str, str]:
    """Name -> URL of every replica, sorted by name."""
    found: dict[str, str] = {}
    for source in _alive():
        found.update(source.urls())
    return dict(sorted(found.items()))


def max_waiting() -> int:
    """Most requests that may wait for a replica in this process; without a router, Ray says when there are too many."""
    return max((source.max_waiting for source in _alive()), default=sys.maxsize)


def knows(replica: str) -> bool:
    """Whether a router knows this replica, so that it takes requests."""
    return any(replica in source.urls() for source in _alive())


def best(keys: Sequence[bytes], avoid: Set[str], loads: Mapping[str, int]) -> str | None:
    """The replica that a request with these keys should go to; None if none is known.

    Args:
        keys: see `prefix_keys`.
        avoid: replicas to take only if there is no other.
        loads: requests that each replica has; missing: none.
    """
    names = urls()
    found = {name: loads.get(name, 0) for name in names if name not in avoid} or dict.fromkeys(names, 0)
    order = best_first(keys, found, max((source.bound for source in _alive()), default=0))
    return order[0] if order else None


def best_first(keys: Sequence[bytes], loads: Mapping[str, int], bound: int) -> list[str]:
    """`ranked` by what this process knows. Equal ones get equal shares."""
    names = list(loads)
    random.shuffle(names)
    return ranked({name: loads[name] for name in names}, KNOWN.lengths(keys, names), bound)


def sent(keys: Iterable[bytes], replica: str) -> None:
    """Remember that a replica has been sent a prompt with these keys."""
    KNOWN.add(list(keys), replica)


def keep(replicas: Iterable[str]) -> None:
    """Forget what other replicas have been sent."""
    KNOWN.keep(replicas)
