"""Ranks whose memory each reaches: of one process, one after the other, or as processes that wait for each other.

As a program, `python -m tests.support.peers RANK SIZE [--one-buffer] DESCRIPTOR...`, it is one of such processes, which
compares what it gets of both ops with what all summands add up to, and fails if that differs.
"""

from __future__ import annotations

import argparse
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import collectives, reference
from kernels.collectives import Peers, all_reduce_bytes, reduce_scatter_bytes
from kernels.launching import cdiv
from kernels.quantized import Quantized, ToInt8

Op = Callable[..., tuple[Tensor | Quantized, Tensor]]

BYTES = {
    collectives.all_reduce_rms_norm: all_reduce_bytes,
    collectives.reduce_scatter_rms_norm: reduce_scatter_bytes,
}
MAX_ROWS, WIDTH, EPS = 7, 64, 1e-5
CALLS = (3, 7, 1, 1, 5, 2)
"""Rows of each call of a process: growing and shrinking, so that rows change their owners."""


def local_peers(op: Op, size: int, max_rows: int, width: int, itemsize: int, device: str = "cpu") -> list[Peers]:
    """The ranks of an op, all in this process; what nobody has written is NaN."""
    num_bytes = BYTES[op](size, max_rows, width, itemsize)
    memories = [torch.full((num_bytes,), 255, dtype=torch.uint8, device=device) for _ in range(size)]
    bases = torch.tensor([memory.data_ptr() for memory in memories], device=device)
    return [
        Peers(rank, size, max_rows, width, memory, bases, torch.zeros(max_rows, dtype=torch.int32, device=device))
        for rank, memory in enumerate(memories)
    ]


def signals_of(op: Op, peers: Peers) -> Tensor:
    """The signals in a rank's own memory."""
    places = peers.size + (op is collectives.reduce_scatter_rms_norm)
    return peers.memory[: 4 * peers.max_rows * places].view(torch.int32)


def in_turn(
    op: Op,
    ranks: Sequence[Peers],
    parts: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> list[tuple[Tensor | Quantized, Tensor]]:
    """What each rank gets, where they run one after the other: twice, since first some of what they read is not there.

    All signals are given from the start, else the first would wait for the second.
    """
    for peers in ranks:
        signals_of(op, peers).fill_(int(peers.generations.max()) + 1)
    before = [peers.generations.clone() for peers in ranks]
    for peers, part in zip(ranks, parts, strict=True):
        op(part, peers, weight, EPS, residual, quantize)
    for peers, generations in zip(ranks, before, strict=True):
        peers.generations.copy_(generations)
    return [op(part, peers, weight, EPS, residual, quantize) for peers, part in zip(ranks, parts, strict=True)]


def owned(rank: int, size: int, num_rows: int) -> slice:
    """The rows of h that a rank has after a reduce-scatter."""
    chunk = cdiv(num_rows, size)
    return slice(rank * chunk, (rank + 1) * chunk)


def run_processes(
    size: int,
    *options: str,
    absent: int = 0,
    timeout_s: float = 120.0,
    program: str = "tests.support.peers",
    width: int = WIDTH,
) -> list[int | None]:
    """Exit codes of the processes of size ranks; None of one that had to be ended, since it or another took too long or
    failed.

    Args:
        absent: last ranks that are not started.
        program: the module that they run.
        width: of the rows that they exchange.
    """
    num_bytes = sum(num_bytes(size, MAX_ROWS, width, 4) for num_bytes in BYTES.values())
    with ExitStack() as stack:
        descriptors = [os.memfd_create(f"rank{rank}") for rank in range(size)]
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
            os.ftruncate(descriptor, num_bytes)
        processes = []
        for rank in range(size - absent):
            command = [sys.executable, "-m", program, str(rank), str(size), *map(str, descriptors)]
            environment = os.environ | {"TRITON_INTERPRET": "1"}
            process = subprocess.Popen([*command, *options], pass_fds=descriptors, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            found = [process.poll() for process in processes]
            if None not in found or any(found):
                # The others may be waiting for one that has failed.
                return found
            time.sleep(0.05)
        return [process.poll() for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("size", type=int)
    parser.add_argument("descriptors", type=int, nargs="+")
    parser.add_argument("--one-buffer", action="store_true", help="count generations by two, which keep one buffer")
    args = parser.parse_args()
    if args.rank == args.size - 1:
        _sleep_before_sums()
    for op, peers in mapped_peers(args.rank, args.descriptors, WIDTH).items():
        _exchange(op, peers, args.one_buffer)


def mapped_peers(rank: int, descriptors: Sequence[int], width: int) -> dict[Op, Peers]:
    """Memory of each op that processes share, one descriptor for each rank."""
    start, size, found = 0, len(descriptors), {}
    whole = [torch.from_numpy(np.frombuffer(mmap.mmap(each, 0), dtype=np.uint8)) for each in descriptors]
    for op, num_bytes in BYTES.items():
        stop = start + num_bytes(size, MAX_ROWS, width, 4)
        memories = [memory[start:stop] for memory in whole]
        bases = torch.tensor([memory.data_ptr() for memory in memories])
        generations = torch.zeros(MAX_ROWS, dtype=torch.int32)
        found[op] = Peers(rank, size, MAX_ROWS, width, memories[rank], bases, generations, memories)
        start = stop
    return found


def _exchange(op: Op, peers: Peers, one_buffer: bool) -> None:
    """Make all calls and compare each with the oracle. The residual is that of the call before, as in a step."""
    for turn, num_rows in enumerate(CALLS):
        generator = torch.Generator().manual_seed(turn)
        parts = torch.randn(peers.size, num_rows, WIDTH, generator=generator)
        weight, residual = torch.randn(WIDTH, generator=generator), torch.randn(num_rows, WIDTH, generator=generator)
        y, h = op(parts[peers.rank], peers, weight, EPS, residual, ToInt8())
        want, want_h = reference.all_reduce_rms_norm(parts, weight, EPS, residual, ToInt8())
        assert isinstance(y, Quantized)
        assert isinstance(want, Quantized)
        is_scattered = op is collectives.reduce_scatter_rms_norm
        rows = owned(peers.rank, peers.size, num_rows) if is_scattered else slice(None)
        assert torch.equal(h[rows], want_h[rows]), f"rank {peers.rank}, call {turn}: h"
        assert (y.codes.int() - want.codes).abs().max() <= 1, f"rank {peers.rank}, call {turn}: codes"
        torch.testing.assert_close(y.scale, want.scale, rtol=1e-5, atol=0)
        if one_buffer:
            peers.generations.add_(1)


def _sleep_before_sums() -> None:
    """Let the other ranks run ahead as far as they can before this one reads what they sent."""
    summed: Any = collectives._sum_parts

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return summed(*args, **kwargs)

    vars(collectives)["_sum_parts"] = late


if __name__ == "__main__":
    main()
