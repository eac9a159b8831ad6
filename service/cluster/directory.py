"""Addresses of the replicas, as the routers of this process last heard of them from Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol
from weakref import ReferenceType, ref


class Source(Protocol):
    """A router."""

    def urls(self) -> Mapping[str, str]:
        """Name -> URL of the replicas that it knows."""
        ...


# Of the routers and not of their methods: whenever Ray reads a deployment's configuration again it gives the router's
# class new functions, and the old ones are gone.
_sources: list[ReferenceType[Source]] = []


def register(source: Source) -> None:
    """Add a router; it is dropped with its last other reference."""
    _sources.append(ref(source))


def urls() -> dict[str, str]:
    """Name -> URL of every replica, sorted by name."""
    found: dict[str, str] = {}
    for weak in list(_sources):
        source = weak()
        if source is None:
            _sources.remove(weak)
        else:
            found.update(source.urls())
    return dict(sorted(found.items()))
