"""Sums over GPUs with residual, RMSNorm and int8 codes behind them: NCCL and a norm beside the kernels of one launch.

    python -m benchmarks.collectives                        all GPUs of this machine, the widths of 8B and 70B
    python -m benchmarks.collectives --ranks 2 --widths 4096 --rows 1,16,64,512 --out benchmarks/results/NAME.json
    python -m benchmarks.collectives --write                and use the fastest way of each size from then on

Each way is checked before it is timed: its codes, scales and residuals must be those of a sum in the order of ranks and
the plain norm, to the bit for the kernels and within a rounding of each addition for NCCL; launched one by one, then
replayed in a CUDA graph over inputs that change between replays. What is wrong is not timed, and the command fails.
Times are of such graphs, the slowest rank's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import kernels
from benchmarks.report import birth_certificate, quantiles, write
from benchmarks.timing import GraphRun
from kernels import Quantized, ToInt8, collectives
from kernels.tiles import BUCKETS, bucket
from kernels.ways import Way, read_ways, user_ways
from service.engine.device.peers import shared_peers
from service.host.ranks.group import join

ROWS = (1, 8, *BUCKETS[:-1])
MOST_AT_ONCE = 1024
"""Most rows that each rank sends whole to all others; beyond, their memory would be large and the links slower."""

EPS = 1e-5
ROUNDS, REPLAYS, CALLS = 15, 3, 16

Call = Callable[[Tensor], tuple[Tensor | Quantized, Tensor]]
Row = dict[str, Any]


class Case:
    """Operands of one size on this rank, which knows all ranks' summands."""

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.shape = (self.size, num_rows, width)
        self.dtype, self.device = dtype, device
        self.weight = self._random(width, seed=1)
        self.residual = self._random(num_rows, width, seed=2)
        self.x = torch.empty(num_rows, width, dtype=dtype, device=device)

    def fill(self, seed: int) -> tuple[Quantized, Tensor]:
        """New summands. Returns what every rank is to get of them: y, and h."""
        parts = self._random(*self.shape, seed=seed)
        self.x.copy_(parts[self.rank])
        total = parts[0].float()
        for part in parts[1:]:
            total += part.float()
        y, h = kernels.rms_norm(total.to(self.dtype), self.weight, EPS, self.residual, ToInt8())
        assert isinstance(y, Quantized)
        return y, h

    def rows(self, way: Way) -> slice:
        """Those of h that this rank has."""
        chunk = -(-self.shape[1] // self.size)
        return slice(self.rank * chunk, (self.rank + 1) * chunk) if way == "reduce_scatter_rms_norm" else slice(None)

    def call(self, way: Way) -> Call:
        """One way over x; the plain one adds into its argument."""
        width, num_rows = self.shape[2], self.shape[1]
        if way == "plain":

            def plain(x: Tensor) -> tuple[Tensor | Quantized, Tensor]:
                dist.all_reduce(x)
                return kernels.rms_norm(x, self.weight, EPS, self.residual, ToInt8())

            return plain
        peers = shared_peers(way, num_rows, width, self.dtype, self.device)
        op = collectives.all_reduce_rms_norm if way == "all_reduce_rms_norm" else collectives.reduce_scatter_rms_norm
        return lambda x: op(x, peers, self.weight, EPS, self.residual, ToInt8())

    def _random(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)


def fault_of(case: Case, way: Way, found: tuple[Tensor | Quantized, Tensor], want: tuple[Quantized, Tensor]) -> str:
    """What of a result is wrong; empty if nothing is."""
    (y, h), (want_y, want_h), rows = found, want, case.rows(way)
    assert isinstance(y, Quantized)
    if way == "plain":
        # NCCL may add in another order, and rounds each sum to the dtype.
        bound = case.size * torch.finfo(case.dtype).eps * want_h.float().abs().max()
        return "" if bool(((h.float() - want_h.float()).abs() <= bound).all()) else "residual stream"
    is_equal = {
        "residual stream": torch.equal(h[rows], want_h[rows]),
        "codes": torch.equal(y.codes, want_y.codes),
        "scales": torch.equal(y.scale, want_y.scale),
    }
    return ", ".join(name for name, equal in is_equal.items() if not equal)


def checked(case: Case, way: Way, call: Call) -> str:
    """What is wrong on any rank, launched one by one or replayed; empty if nothing is."""
    faults = []
    for seed in range(10, 10 + REPLAYS):
        want = case.fill(seed)
        faults.append(fault_of(case, way, call(case.x), want))
    graph, kept = torch.cuda.CUDAGraph(), []
    case.fill(0)
    torch.cuda.synchronize()
    dist.barrier()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        # Twice, so that both buffers of a kernel that has two are replayed, and a third time, so that they change.
        kept = [call(case.x.clone() if way == "plain" else case.x) for _ in range(3)]
    for seed in range(20, 20 + REPLAYS):
        want = case.fill(seed)
        graph.replay()
        torch.cuda.synchronize()
        faults += [fault_of(case, way, kept[-1], want)]
    told = [fault for fault in faults if fault]
    gathered: list[Any] = [None] * case.size
    dist.all_gather_object(gathered, told)
    return "; ".join(f"rank {rank}: {fault}" for rank, found in enumerate(gathered) for fault in found[:1])


def timed(calls: dict[Way, tuple[Case, Call]]) -> dict[Way, dict[str, float]]:
    """Microseconds of each way: quantiles over rounds of the slowest rank. All ranks replay at the same time."""
    runs = {way: GraphRun([partial(call, case.x)] * CALLS, 1, keep=False) for way, (case, call) in calls.items()}
    samples: dict[Way, list[float]] = {way: [] for way in runs}
    for _ in range(ROUNDS):
        for way, run in runs.items():
            torch.cuda.synchronize()
            dist.barrier()
            worst = torch.tensor([1e6 * run.sample()], device="cuda")
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            samples[way].append(float(worst))
    return {way: {f"us_{name}": value for name, value in quantiles(found).items()} for way, found in samples.items()}


def rows_of(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """A row of the result for each way."""
    case = Case(num_rows, width, dtype, device)
    ways = [way for way in get_args(Way) if way != "all_reduce_rms_norm" or num_rows <= MOST_AT_ONCE]
    calls: dict[Way, tuple[Case, Call]] = {}
    wrong: dict[Way, str] = {}
    for way in ways:
        call = case.call(way)
        fault = checked(case, way, call)
        if fault:
            wrong[way] = fault
        else:
            calls[way] = case, call
    times = timed(calls)
    fields = {"ranks": case.size, "width": width, "rows": num_rows, "dtype": str(dtype).removeprefix("torch.")}
    return [fields | {"way": way} | ({"wrong": wrong[way]} if way in wrong else times[way]) for way in ways]


def fastest(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """The table of ways that the results make: of each bucket that was measured at its end, the way of least time.

    That is the time of all rows that were measured in the bucket, together.
    """
    times_us: dict[str, dict[int, dict[str, list[float]]]] = {}
    for row in rows:
        if row["rows"] <= BUCKETS[-1] and "us_p50" in row:
            limits = times_us.setdefault(f"{row['ranks']}x{row['width']}", {})
            limits.setdefault(bucket(row["rows"]), {}).setdefault(row["way"], []).append(row["us_p50"])
    ends = {(f"{row['ranks']}x{row['width']}", row["rows"]) for row in rows if "us_p50" in row}
    return {
        key: {str(limit): _least(ways) for limit, ways in sorted(limits.items()) if (key, limit) in ends}
        for key, limits in times_us.items()
    }


def _least(times_us: dict[str, list[float]]) -> str:
    """The way of least time among those that were measured for as many rows as any."""
    most = max(map(len, times_us.values()))
    return min((way for way in times_us if len(times_us[way]) == most), key=lambda way: sum(times_us[way]))


def write_ways(gpu_name: str, ways: dict[str, dict[str, str]]) -> Path:
    """Put ways into the user's table, beside those of other sizes that it has."""
    path = user_ways(gpu_name)
    for (size, width, limit), way in read_ways(path).items():
        ways.setdefault(f"{size}x{width}", {}).setdefault(str(limit), way)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": gpu_name, "ways": ways}, indent=1) + "\n", encoding="utf-8")
    return path


def run(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One rank; the first prints and writes the results."""
    device = torch.device("cuda", rank)
    join(rank, args.ranks, Path(meeting), device)
    rows: list[Row] = []
    for width in args.widths:
        for num_rows in args.rows:
            rows += rows_of(num_rows, width, getattr(torch, args.dtype), device)
            if rank == 0:
                for row in rows[-len(get_args(Way)) :]:
                    if (row["rows"], row["width"]) == (num_rows, width):
                        said = row["wrong"] if "wrong" in row else f"{row['us_p50']:8.1f} us"
                        print(f"{args.ranks} ranks, {num_rows:5} x {width:5}  {row['way']:24} {said}")
    dist.barrier()
    if rank == 0:
        if args.out:
            write(args.out, birth_certificate(args.commit), rows)
        if any("wrong" in row for row in rows):
            print("a result is wrong: nothing is written to the table of ways", file=sys.stderr)
        elif args.write:
            print(f"wrote {write_ways(torch.cuda.get_device_name(device), fastest(rows))}")
    dist.destroy_process_group()
    if any("wrong" in row for row in rows):
        raise SystemExit(1)


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="GPUs; default: all")
    parser.add_argument("--widths", type=numbers, default=[4096, 8192], help="hidden sizes")
    parser.add_argument("--rows", type=numbers, default=list(ROWS), help="tokens of a step")
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--write", action="store_true", help="use the fastest way of each size from now on")
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not 2 <= args.ranks <= torch.cuda.device_count():
        raise SystemExit(f"--ranks {args.ranks} needs 2 GPUs or more, and {torch.cuda.device_count()} are visible here")
    with tempfile.TemporaryDirectory() as meeting:
        spawn(run, (args, meeting), nprocs=args.ranks)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
