"""Several processes that run the steps of one decoder: what they join, and what the first tells the others.

The first rank plans the steps, samples and answers. It tells the others each call that meets theirs before it makes it
itself, so that all meet in one order.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from service.engine.shapes import Shape
from service.engine.step_table import StepTable

# torch 2.13 renames it.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class GroupRanks:
    """Implements `service.models.sharding.Ranks` with the process group that this process has joined."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def sum(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        found = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        ALL_GATHER(found.view(-1), x.contiguous().view(-1))
        return found

    def from_first(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        dist.broadcast(x, 0)
        return x


class Lead(Protocol):
    """The first rank's way to make the other ranks' runners of a variant do their part."""

    def warm(self) -> None:
        """They go one piece further in `Runner.warming`."""
        ...

    def forward(self, table: StepTable, shape: Shape | None) -> None:
        """They call `Runner.follow` with the step, padded to a shape that is captured, if one is given."""
        ...

    def chosen(self, num_samples: int) -> None:
        """They call `Runner.take_ids`."""
        ...

    def scored(self, rows: Tensor) -> None:
        """They call `Runner.follow_scores` with these rows [R] int64 of the step, on the host."""
        ...
