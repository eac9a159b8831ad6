"""The ranks of one decoder as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from service.models.sharding import Ranks

T = TypeVar("T")


class ThreadRanks:
    """One of several ranks that meet at a barrier; sums are added in the order of the ranks."""

    def __init__(self, rank: int, barrier: threading.Barrier, given: list[Tensor | None]) -> None:
        self.rank = rank
        self.size = len(given)
        self._barrier = barrier
        self._given = given

    def sum(self, x: Tensor) -> Tensor:
        first, *others = self._all(x)
        for other in others:
            first = first + other
        return first

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x))

    def from_first(self, x: Tensor) -> Tensor:
        return self._all(x)[0]

    def _all(self, x: Tensor) -> list[Tensor]:
        self._given[self.rank] = x
        self._barrier.wait(60)
        found = [each for each in self._given if each is not None]
        self._barrier.wait(60)
        assert len(found) == self.size
        return found


def on_ranks(size: int, do: Callable[[Ranks], T]) -> list[T]:
    """What do returns on each of size ranks."""
    barrier, given = threading.Barrier(size), list[Tensor | None]([None] * size)

    def run(rank: int) -> T:
        try:
            with torch.inference_mode():
                return do(ThreadRanks(rank, barrier, given))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
