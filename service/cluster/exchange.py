"""What the gateway sends to a replica and reads from it, as protocols that need neither Ray nor an HTTP client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

LEASE = "x-ottava-lease"
"""Header with the number of a request's lease."""

Headers = Sequence[tuple[bytes, bytes]]


class Unreachable(Exception):
    """The replica could not be reached: it has computed nothing of the request."""


class Lost(Exception):
    """The replica ended while it had the request."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as it is sent to a replica. target: path and query as the client wrote them."""

    method: str
    target: str
    headers: Headers
    body: bytes


class Answer(Protocol):
    """A replica's answer, whose body may still be on its way."""

    status: int
    headers: Headers

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body in pieces as they come. Raises Lost if the replica ends before it is complete."""
        ...

    def close(self) -> None:
        """Let go of the connection; the replica ends an unfinished request. Idempotent."""
        ...


class Upstream(Protocol):
    """Sends requests to replicas."""

    async def send(self, url: str, sent: Sent) -> Answer:
        """Returns once the head of the answer is there. Raises Unreachable or Lost."""
        ...


class Lease(Protocol):
    """A place for one request in one replica, which ends some time after the replica has answered the request."""

    replica: str
    url: str
    number: int

    def on_lost(self, call: Callable[[], None]) -> None:
        """Call this on the event loop's thread if the replica ends, or has ended, before the lease does."""
        ...

    def done(self, is_whole: bool) -> None:
        """The request has ended; called once.

        is_whole: its answer has been read to the end, so that another request may have the place.
        """
        ...


class Fleet(Protocol):
    """The replicas that take requests."""

    def replicas(self) -> Mapping[str, str]:
        """Name -> URL of every replica, in a fixed order."""
        ...

    async def lease(self, keys: Sequence[bytes], avoid: Set[str]) -> Lease:
        """Wait for a place.

        Args:
            keys: of the prompt's prefixes; see `prefix_keys`.
            avoid: replicas to take only if there is no other.

        Raises:
            QueueFull, QueueTimeout: too many requests wait for a place, or this one has waited too long.
            Unreachable: the replica that was chosen has just ended.
        """
        ...
