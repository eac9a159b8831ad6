"""Times of calls that take turns, in CUDA graphs on a GPU and by the clock on a CPU, and the roofs they stand under.

Every call is given in several copies over different memory, so that none finds its operands in the L2 cache. One graph
runs all copies once or more; a sample is the time of a replay over the number of calls in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.report import quantiles

Call = Callable[[], object]

ROTATION_BYTES = 256 * 2**20
"""Operands are rotated through this much memory: five times the L2 cache of an H100."""

SAMPLING_S = 0.03
MIN_SAMPLES, MAX_SAMPLES = 7, 25
MAX_COPIES = 64
GRAPH_S = 1e-3
"""A graph lasts about this long, so that the few microseconds of its own launch do not count."""

PEAK_INT8_TOPS = {"NVIDIA H100 80GB HBM3": 1979.0, "NVIDIA H200": 1979.0}
"""Dense int8 operations by data sheet; fp16 has half."""


class WrongResult(Exception):
    """A kernel's result differs from the exact one: it is not timed."""


class Unsupported(Exception):
    """A contender has no form for this size, or is not here."""


@dataclass(frozen=True, slots=True)
class Absent:
    """Why there is no time."""

    reason: str
    is_wrong: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that one call must move and operations it must do, each operand read or written once."""

    num_bytes: float
    operations: float = 0.0
    is_int8: bool = False


@dataclass(frozen=True, slots=True)
class Roofs:
    """The measured copy rate (bytes read + written) and the data sheet's int8 peak, where it is known."""

    copy_gb_per_s: float
    int8_tops: float | None

    def floor_s(self, work: Work) -> float:
        """The time below which the work cannot be done: of its bytes, or of its operations."""
        bytes_s = work.num_bytes / (1e9 * self.copy_gb_per_s)
        if self.int8_tops is None:
            return bytes_s
        return max(bytes_s, work.operations / (1e12 * self.int8_tops * (1.0 if work.is_int8 else 0.5)))


class Run(Protocol):
    """Calls that are ready to be timed."""

    num_calls: int

    def sample(self) -> float: ...


class GraphRun:
    """Calls captured in one CUDA graph. With keep, what they return stays alive, so that no two write one place."""

    def __init__(self, calls: Sequence[Call], repeats: int, keep: bool) -> None:
        self.num_calls = len(calls) * repeats
        # The graph holds addresses alone: an operand that is given back, and unmapped by the next capture, is a fault.
        self.calls = calls
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        kept: list[object] = []
        # A capture that fails leaves its stream current; the outer context gives ours back.
        # NCCL's own threads ask for its events meanwhile, which only this mode allows.
        capture = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            for call in (call for _ in range(repeats) for call in calls):
                y = call()
                if keep:
                    kept.append(y)
        self.sample()

    def sample(self) -> float:
        """Seconds of one call."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self.graph.replay()
        stop.record()
        stop.synchronize()
        return 1e-3 * float(start.elapsed_time(stop)) / self.num_calls


class ClockRun:
    """Calls made one after the other, for a machine without a GPU."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.num_calls = len(calls)
        self.calls = calls
        self.sample()

    def sample(self) -> float:
        """Seconds of one call."""
        started = time.perf_counter()
        for call in self.calls:
            call()
        return (time.perf_counter() - started) / self.num_calls


def prepare(calls: Sequence[Call], floor_s: float, keep: bool) -> Run:
    """The calls, warmed up; floor_s, what one takes at least, says how often a graph repeats them."""
    if not torch.cuda.is_available():
        return ClockRun(calls)
    wanted = min(GRAPH_S / floor_s, MAX_COPIES)
    return GraphRun(calls, max(1, round(wanted / len(calls))), keep)


def measure(
    contenders: Mapping[str, Callable[[], Sequence[Call]]], floor_s: float, keep: bool = False
) -> dict[str, list[float] | Absent]:
    """Seconds per call of each contender, sampled in turns, or why there are none.

    contenders: by name, what checks its result and gives its calls, one per copy of the operands. A `WrongResult`
        that it raises leaves it untimed, and so does any other error.
    """
    runs: dict[str, Run] = {}
    absent: dict[str, Absent] = {}
    for name, make in contenders.items():
        try:
            runs[name] = prepare(make(), floor_s, keep)
        except WrongResult as error:
            absent[name] = Absent(first_line(error), is_wrong=True)
        except Exception as error:  # noqa: BLE001  what another project's kernel raises is not known; the row names it
            absent[name] = Absent(first_line(error))
    times = take_turns(runs)
    return {name: absent[name] if name in absent else times[name] for name in contenders}


def take_turns(runs: Mapping[str, Run]) -> dict[str, list[float]]:
    """Samples of each run, one of each in every round, so that a card that grows warm is warm for all."""
    if not runs:
        return {}
    slowest_s = max(run.sample() * run.num_calls for run in runs.values())
    rounds = min(MAX_SAMPLES, max(MIN_SAMPLES, int(SAMPLING_S / slowest_s)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run.sample())
    return times


def result_row(fields: dict[str, Any], times: list[float] | Absent, work: Work, roofs: Roofs) -> dict[str, Any]:
    """One row of the result: quantiles in microseconds and the rates of the median, or why there is no time."""
    if isinstance(times, Absent):
        return fields | ({"wrong": times.reason} if times.is_wrong else {"absent": times.reason})
    row = fields | {f"us_{name}": 1e6 * value for name, value in quantiles(times).items()}
    p50_s = row["us_p50"] / 1e6
    row |= {"samples": len(times), "gb_per_s": work.num_bytes / p50_s / 1e9}
    row |= {"copy_share": row["gb_per_s"] / roofs.copy_gb_per_s, "roof_share": roofs.floor_s(work) / p50_s}
    return row | ({"tops": work.operations / p50_s / 1e12} if work.operations else {})


def add_ratios(rows: list[dict[str, Any]], baseline: str, name: str) -> None:
    """name = the baseline's time over this row's, for the rows of one case."""
    base = next((row["us_p50"] for row in rows if row["variant"] == baseline and "us_p50" in row), None)
    for row in rows:
        if base is not None and "us_p50" in row and row["variant"] != baseline:
            row[name] = base / row["us_p50"]


def num_copies(num_bytes: float, limit: int = MAX_COPIES) -> int:
    """How many copies of operands of this size a run rotates through; two on a CPU, which is not raced."""
    if not torch.cuda.is_available():
        return 2
    return min(limit, max(2, -int(-ROTATION_BYTES // num_bytes)))


def measure_roofs(device: torch.device) -> Roofs:
    """The rate of a copy of 1 GiB (16 MiB on a CPU), by the copy engine or a kernel, and the data sheet's peak."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    words = source.view(torch.int64), target.view(torch.int64)
    ways: list[Call] = [lambda: target.copy_(source), lambda: torch.bitwise_not(words[0], out=words[1])]
    runs = {str(way): prepare([way], GRAPH_S, keep=False) for way in ways}
    copy_s = min(quantiles(times)["p50"] for times in take_turns(runs).values())
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return Roofs(2 * size / copy_s / 1e9, PEAK_INT8_TOPS.get(name))


def expect(is_right: bool | Tensor, what: str) -> None:
    """Raise unless a check holds.

    Raises:
        WrongResult: it does not.
    """
    if not bool(is_right):
        raise WrongResult(what)


def first_line(error: Exception) -> str:
    """The error's kind and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]
