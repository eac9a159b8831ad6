"""What `target_itl_ms` brings and costs: the engine's own scheduler over the times of measured steps.

    python -m benchmarks.targets benchmarks/results/steps-llama-3.1-8b-h200.json --variant w8a8 --loads 28,70,burst:256
    python -m benchmarks.targets --line 11.3 66 --key-ns 39 --targets 25,35,45     a step takes 11.3 ms and 66 us a row

Requests of --input-len and --output-len tokens arrive at random times, for --seconds, or all at once. A step takes
what its captured shape took, and --key-ns more for each key that a decode reads; the next one is planned --ahead-ms
before it ends. Nothing else is in it: no HTTP, no host that is late.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import birth_certificate, write
from benchmarks.traffic import SLOS
from service.engine.api import SamplingParams
from service.engine.pacing import default_target_s
from service.engine.request import Request
from service.engine.scheduler import Scheduler, Step, StepResults
from service.engine.shapes import Shape, shapes_of, without_slow
from service.measures import percentile

MAX_TOKENS, MAX_REQUESTS, BLOCK_SIZE = 4096, 256, 16
GOOD_S = dict(zip(("first", "token"), (float(slo.partition(":")[2]) / 1e3 for slo in SLOS), strict=True))


@dataclass(slots=True)
class Seen:
    """When a request arrived and when its tokens came."""

    arrival_s: float
    times_s: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        return self.times_s[0] - self.arrival_s

    @property
    def token_s(self) -> float:
        return (self.times_s[-1] - self.times_s[0]) / max(1, len(self.times_s) - 1)

    @property
    def is_good(self) -> bool:
        return self.first_s <= GOOD_S["first"] and self.token_s <= GOOD_S["token"]


class Device:
    """Knows what steps take.

    Args:
        times_s: seconds of each captured shape.
        key_s: more, for each key that a decode reads.
    """

    def __init__(self, times_s: Mapping[Shape, float], key_s: float) -> None:
        self.times_s = times_s
        self._key_s = key_s
        mixed = without_slow((shape for shape in times_s if not shape.is_decode), times_s)
        self._shapes = {True: sorted(shape for shape in times_s if shape.is_decode), False: sorted(mixed)}

    def run(self, step: Step) -> tuple[Shape, float]:
        """The shape that a step is padded to, and how long it takes."""
        shapes, num_tokens = self._shapes[step.is_decode], step.num_tokens
        place = bisect_left(shapes, num_tokens, key=lambda shape: shape.num_tokens)
        shape = next(each for each in shapes[place:] if each.num_requests >= len(step.chunks))
        keys = sum(chunk.start for chunk in step.chunks if chunk.length == 1)
        return shape, self.times_s[shape] + self._key_s * keys


def simulated(
    device: Device, target_s: float | None, arrivals_s: Sequence[float], args: argparse.Namespace
) -> list[Seen]:
    """Serve requests that arrive at these times, and return what became of each."""
    scheduler = Scheduler(
        num_blocks=MAX_REQUESTS * -(-(args.input_len + args.output_len) // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_num_requests=MAX_REQUESTS,
        max_batched_tokens=MAX_TOKENS,
        target_itl_s=target_s,
        step_times_s=device.times_s,
        has_prefix_cache=False,
    )
    params = SamplingParams(args.output_len, ignore_eos=True)
    coming = deque(Request(str(n), [7] * args.input_len, params, at_s, 0) for n, at_s in enumerate(arrivals_s))
    seen = {request: Seen(request.arrival_s) for request in coming}
    unread: deque[tuple[Step, Shape, float, float]] = deque()
    now_s = end_s = 0.0
    while coming or unread or not scheduler.is_idle:
        now_s = max(now_s, end_s - args.ahead_ms / 1e3)
        if scheduler.is_idle and not unread:
            now_s = max(now_s, coming[0].arrival_s)
        while coming and coming[0].arrival_s <= now_s:
            scheduler.add(coming.popleft())
        step = scheduler.schedule(now_s)
        if unread:
            _read(scheduler, *unread.popleft(), seen)
        if step is not None:
            shape, time_s = device.run(step)
            end_s = max(end_s, now_s) + time_s
            unread.append((step, shape, time_s, end_s))
    return list(seen.values())


def _read(
    scheduler: Scheduler, step: Step, shape: Shape, time_s: float, end_s: float, seen: Mapping[Request, Seen]
) -> None:
    samples = sum(chunk.samples for chunk in step.chunks)
    results = StepResults(end_s, [1] * samples, shape=shape, device_s=time_s)
    for _, request in scheduler.commit(step, results):
        seen[request].times_s.append(end_s)


def measured(path: Path, variant: str) -> dict[Shape, float]:
    """Seconds of each shape, of a file of `benchmarks.steps`."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    steps = [row for row in rows if row["what"] == "step"]
    return {
        Shape(row["tokens"], row["requests"], is_decode=row["is_decode"]): row[f"{variant}_ms"] / 1e3 for row in steps
    }


def on_a_line(lone_ms: float, row_us: float) -> dict[Shape, float]:
    """Seconds of each shape: so much for any, and so much more a row."""
    return {
        shape: lone_ms / 1e3 + (shape.num_tokens - 1) * row_us / 1e6 for shape in shapes_of(MAX_TOKENS, MAX_REQUESTS)
    }


def arrivals(load: str, seconds: float) -> list[float]:
    """Times of a load: requests a second, or burst:N."""
    kind, _, count = load.rpartition(":")
    if kind not in ("", "burst"):
        raise ValueError(f"{load!r} is no load; use requests a second, or burst:REQUESTS")
    if kind:
        return [0.0] * int(count)
    rng = random.Random(0)
    steps = itertools.accumulate(rng.expovariate(float(load)) for _ in itertools.count())
    found = list(itertools.takewhile(lambda at_s: at_s < seconds, steps))
    if not found:
        raise ValueError(f"nobody comes within {seconds:g} s at {load} requests/s; use more --seconds")
    return found


def row_of(load: str, target_s: float, seen: Sequence[Seen]) -> dict[str, Any]:
    """What the clients of one load saw, in milliseconds, p50 and p99."""
    gaps_s = [after - before for each in seen for before, after in itertools.pairwise(each.times_s)]
    series = {
        "first_token_ms": [each.first_s for each in seen],
        "per_token_ms": [each.token_s for each in seen],
        "between_tokens_ms": gaps_s,
    }
    return {
        "load": load,
        "target_itl_ms": target_s * 1e3,
        "output_tokens_per_s": sum(len(each.times_s) for each in seen) / max(each.times_s[-1] for each in seen),
        "good_share": sum(each.is_good for each in seen) / len(seen),
    } | {name: [percentile([1e3 * value for value in values], p) for p in (50, 99)] for name, values in series.items()}


def rows_of(times_s: Mapping[Shape, float], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each load and target."""
    device = Device(times_s, args.key_ns / 1e9)
    targets_s = [target / 1e3 for target in args.targets] or [default_target_s(times_s)]
    for load, target_s in itertools.product(args.loads, targets_s):
        yield row_of(load, target_s, simulated(device, target_s, arrivals(load, args.seconds), args))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row, milliseconds, p50 / p99."""
    lines = [f"{'load':<11}{'target':>7}{'out/s':>8}{'good':>6}{'first token':>17}{'per token':>15}{'between':>15}"]
    for row in rows:
        times = [row[name] for name in ("first_token_ms", "per_token_ms", "between_tokens_ms")]
        told = [f"{p50:.1f} / {p99:.1f}" for p50, p99 in times]
        head = (
            f"{row['load']:<11}{row['target_itl_ms']:>7.1f}{row['output_tokens_per_s']:>8.0f}{row['good_share']:>6.0%}"
        )
        lines.append(f"{head}{told[0]:>17}{told[1]:>15}{told[2]:>15}")
    return "\n".join(lines)


def _list(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [of(word) for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path, nargs="?", help="a file of benchmarks.steps")
    parser.add_argument("--variant", default="w8a8")
    parser.add_argument("--line", type=float, nargs=2, metavar=("MS", "US_PER_ROW"), help="instead of a file")
    parser.add_argument("--key-ns", type=float, default=31.0)
    parser.add_argument("--loads", type=_list(str), default="28,burst:256")
    parser.add_argument("--targets", type=_list(float), default="", help="ms; without any the default of these steps")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--ahead-ms", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if (args.steps is None) == (args.line is None):
        parser.error("give either a file of steps or --line")
    times_s = measured(args.steps, args.variant) if args.steps else on_a_line(*args.line)
    rows = list(rows_of(times_s, args))
    print(table(rows))
    if args.out:
        write(args.out, birth_certificate(), rows)


if __name__ == "__main__":
    main()
