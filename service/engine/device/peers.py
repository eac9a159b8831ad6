"""Memory that the GPUs of all ranks reach, for the kernels that sum over ranks."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from kernels import Quantized, collectives
from kernels.tiles import current_gpu
from kernels.ways import Way, most_rows
from service.models.weights import Norm

logger = logging.getLogger(__name__)

UNICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""Torch would try to set up multicast over NVLink, which the kernels do not use."""


def open_peers(max_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[Way, collectives.Peers]:
    """Memory for each op that the table of ways chooses for rows of this width; empty if it chooses none.

    All ranks of the default process group call it, whose GPUs and tables are the same.
    """
    name, size = current_gpu(device).name, dist.get_world_size()
    ways: tuple[Way, ...] = ("all_reduce_rms_norm", "reduce_scatter_rms_norm")
    rows = {way: most_rows(name, size, width, way, max_rows) for way in ways}
    for way, num_rows in rows.items():
        if num_rows:
            logger.info("sums over %d ranks of up to %d rows of %d may go by %s", size, num_rows, width, way)
    return {way: shared_peers(way, num_rows, width, dtype, device) for way, num_rows in rows.items() if num_rows}


def shared_peers(way: Way, max_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> collectives.Peers:
    """Memory for one op, on all ranks of the default process group, which all call this."""
    for name, value in UNICAST.items():
        os.environ.setdefault(name, value)
    rank, size = dist.get_rank(), dist.get_world_size()
    num_bytes = (
        collectives.all_reduce_bytes(size, max_rows, width, dtype.itemsize)
        if way == "all_reduce_rms_norm"
        else collectives.reduce_scatter_bytes(size, max_rows, width, dtype.itemsize)
    )
    memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    group = dist.group.WORLD
    assert group is not None
    handle = symmetric_memory.rendezvous(memory, group)
    assert handle.buffer_ptrs[rank] == memory.data_ptr()
    memory.zero_()
    # Nobody may signal before all memory is zero.
    torch.cuda.synchronize(device)
    dist.barrier()
    bases = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    generations = torch.zeros(max_rows, dtype=torch.int32, device=device)
    return collectives.Peers(rank, size, max_rows, width, memory, bases, generations, handle)


def peers_norm(
    way: Way, peers: collectives.Peers, x: Tensor, residual: Tensor | None, norm: Norm
) -> tuple[Tensor | Quantized, Tensor]:
    """`Ranks.all_reduce_norm` by one of the ops."""
    if way == "all_reduce_rms_norm":
        return collectives.all_reduce_rms_norm(x, peers, norm.weight, norm.eps, residual, norm.quantize)
    y, h = collectives.reduce_scatter_rms_norm(x, peers, norm.weight, norm.eps, residual, norm.quantize)
    # Floats are what the decoder returns, which is kept beyond the next call.
    return (y.clone() if isinstance(y, Tensor) else y), h
