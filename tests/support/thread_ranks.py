"""The ranks of one decoder as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from kernels import Quantized
from service.models.sharding import Ranks
from service.models.weights import Norm

T = TypeVar("T")


class ThreadRanks:
    """One of several ranks that meet at a barrier; sums are added in the order of the ranks."""

    def __init__(self, rank: int, barrier: threading.Barrier, given: list[Tensor | None]) -> None:
        self.rank = rank
        self.size = len(given)
        self._barrier = barrier
        self._given = given

    def reserve(self, max_rows: int, width: int, dtype: torch.dtype) -> None:
        pass

    def all_reduce_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor | Quantized, Tensor]:
        return norm(self.all_reduce(x), residual)

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self._all(x)
        for other in others:
            first = first + other
        return first

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x))

    def broadcast(self, x: Tensor) -> Tensor:
        return self._all(x)[0]

    def _all(self, x: Tensor) -> list[Tensor]:
        self._given[self.rank] = x
        self._barrier.wait(60)
        found = [each for each in self._given if each is not None]
        self._barrier.wait(60)
        assert len(found) == self.size
        return found


class ShardingRanks(ThreadRanks):
    """Keeps of the residual stream its own rows alone, as a reduce-scatter does; the others are NaN."""

    def all_reduce_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor | Quantized, Tensor]:
        y, h = super().all_reduce_norm(x, residual, norm)
        chunk = -(-len(x) // self.size)
        kept = torch.full_like(h, float("nan"))
        kept[self.rank * chunk : (self.rank + 1) * chunk] = h[self.rank * chunk : (self.rank + 1) * chunk]

        def joined(own: Tensor) -> Tensor:
            parts = enumerate(self._all(own))
            return torch.cat([part[rank * chunk : (rank + 1) * chunk] for rank, part in parts])

        return (joined(y) if isinstance(y, Tensor) else Quantized(joined(y.codes), joined(y.scale))), kept


def on_ranks(size: int, do: Callable[[Ranks], T], kind: type[ThreadRanks] = ThreadRanks) -> list[T]:
    """What do returns on each of size ranks."""
    barrier, given = threading.Barrier(size), list[Tensor | None]([None] * size)

    def run(rank: int) -> T:
        try:
            with torch.inference_mode():
                return do(kind(rank, barrier, given))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
