"""Who starts next when several API keys wait: each has its share of rows, and within it whoever was served least.

An owner is the API key that a request came with. Among owners order of arrival and priority do not count, or one of
them could keep all others waiting; within an owner they do: see `turn`.

Each owner has a counter of the tokens that were computed for it, drafts that turned out wrong among them. An owner
that comes back is raised to the smallest counter among those present, so that nobody saves up service while away (the
virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024).
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator
from heapq import merge

from service.engine.request import Request


def turn(request: Request) -> tuple[int, bool, int]:
    """Sorts an owner's requests: by priority, preempted ones before new ones, first come first served."""
    return request.params.priority, not request.has_started, request.number


class Waiting:
    """The queued requests, each owner's in `turn`."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Request]] = {}
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Request]:
        return merge(*self._queues.values(), key=turn)

    def add(self, request: Request) -> None:
        insort(self._queues.setdefault(request.params.owner, []), request, key=turn)
        self._num += 1

    def remove(self, request: Request) -> None:
        queue = self._queues[request.params.owner]
        queue.remove(request)
        self._num -= 1
        if not queue:
            del self._queues[request.params.owner]

    def heads(self, may_start: Callable[[Request], bool]) -> dict[str, Request]:
        """The first request of each owner that may start."""
        found = ((owner, next(filter(may_start, queue), None)) for owner, queue in self._queues.items())
        return {owner: request for owner, request in found if request is not None}


class Shares:
    """What the owners have, and what each may have while others wait.

    Args:
        num_rows: rows that they share.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._num_requests: Counter[str] = Counter()
        self._num_running: Counter[str] = Counter()
        self._served: dict[str, int] = {}
        self._floor = 0

    @property
    def num_owners(self) -> int:
        """Owners that have a request, waiting or running."""
        return len(self._num_requests)

    @property
    def num_rows(self) -> int:
        """Rows that an owner may have while others wait."""
        return max(1, self._num_rows // max(1, self.num_owners))

    def enter(self, owner: str) -> None:
        """Count a request of this owner as present, until `leave`."""
        if owner not in self._num_requests:
            present = [self._served[other] for other in self._num_requests]
            self._floor = max(self._floor, min(present) if present else max(self._served.values(), default=0))
            self._served[owner] = max(self._served.get(owner, 0), self._floor)
        self._num_requests[owner] += 1

    def leave(self, owner: str) -> None:
        _count_down(self._num_requests, owner)

    def start(self, owner: str) -> None:
        """Count a request of this owner as running, until `stop`."""
        self._num_running[owner] += 1

    def stop(self, owner: str) -> None:
        _count_down(self._num_running, owner)

    def charge(self, owner: str, num_tokens: int) -> None:
        """Count tokens that a step computes for this owner."""
        self._served[owner] += num_tokens

    def num_running(self, owner: str) -> int:
        return self._num_running[owner]

    def order(self, request: Request) -> tuple[bool, int, int]:
        """Sorts the owners' first requests: those below their share of rows first, then whoever was served least."""
        owner = request.params.owner
        return self._num_running[owner] >= self.num_rows, self._served[owner], request.number


def _count_down(counter: Counter[str], owner: str) -> None:
    counter[owner] -= 1
    if not counter[owner]:
        del counter[owner]
