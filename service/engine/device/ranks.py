"""Several processes that run the steps of one decoder: what they join, and what the first tells the others.

The first rank plans the steps, samples and answers. It tells the others each call that meets theirs before it makes it
itself, so that all meet in one order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import Quantized
from kernels.tiles import current_gpu
from kernels.ways import Way, choose
from service.engine.device.peers import open_peers, peers_norm
from service.engine.shapes import Shape
from service.engine.step_table import StepTable
from service.models.weights import Norm

if TYPE_CHECKING:
    from kernels.collectives import Peers

# torch 2.13 renames it.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class GroupRanks:
    """Implements `service.models.sharding.Ranks` with the process group that this process has joined.

    Sums are the group's, NCCL's or gloo's, unless a table of ways says that a kernel of ours is faster.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._peers: dict[tuple[int, torch.dtype], dict[Way, Peers]] = {}
        self._gpu_name = ""

    def reserve(self, max_rows: int, width: int, dtype: torch.dtype) -> None:
        """See `Ranks`."""
        if dist.get_backend() == "nccl" and (width, dtype) not in self._peers:
            device = torch.device("cuda", torch.cuda.current_device())
            self._gpu_name = current_gpu(device).name
            self._peers[width, dtype] = open_peers(max_rows, width, dtype, device)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        dist.all_reduce(x)
        return x

    def all_reduce_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor | Quantized, Tensor]:
        """See `Ranks`."""
        found = self._peers.get((x.shape[1], x.dtype))
        way = choose(self._gpu_name, self.size, x.shape[1], len(x)) if found else "plain"
        peers = found.get(way) if found else None
        # A text that is scored as a whole may be longer than any step.
        if peers is None or len(x) > peers.max_rows or norm.bias is not None:
            return norm(self.all_reduce(x), residual)
        return peers_norm(way, peers, x, residual, norm)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        found = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        ALL_GATHER(found.view(-1), x.contiguous().view(-1))
        return found

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        dist.broadcast(x, 0)
        return x


class Lead(Protocol):
    """The first rank's way to make the other ranks' runners of a variant do their part."""

    def warm(self) -> None:
        """They go one piece further in `Runner.warming`."""
        ...

    def forward(self, table: StepTable, shape: Shape | None, *, is_behind: bool) -> int:
        """They call `Runner.follow` with the step, padded to a shape that is captured, if one is given.

        is_behind: the step before has not ended.   Returns what to call `was_late` with.
        """
        ...

    def was_late(self, slot: int) -> bool:
        """Whether one of them launched this step when the one before had ended, though the first rank said it had not.

        Asked once the step has been read, and before the next but one is told.
        """
        ...

    def chosen(self, num_samples: int) -> None:
        """They call `Runner.take_ids`."""
        ...

    def scored(self, rows: Tensor) -> None:
        """They call `Runner.follow_scores` with these rows [R] int64 of the step, on the host."""
        ...
