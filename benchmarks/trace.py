"""Where the device's time goes in steps that read prompts beside decodes: what runs, and how long it idles.

    python -m benchmarks.trace --shape llama-3.1-8b --variant w8a8 --rate 28

Requests of --prompt and --tokens arrive at random times at an engine of this process. Once it is busy, torch's profiler
records every kernel and copy for --seconds. Idle is the time in which none of them runs:

- between steps: before the first kernel after a gap of more than GAP_US; what the host does not hide.
- within steps: all shorter gaps, from one kernel of a graph to the next.

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.shapes import SHAPES
from quant.scheme import PRESETS
from service.engine.api import Engine, SamplingParams
from service.engine.device.device_thread import DeviceThread
from service.host.memory import cache_budget
from service.host.variants import Loaded, Variant, start_variant
from service.models.config import ModelConfig
from service.models.random_weights import random_decoder
from service.settings import Settings

GAP_US = 5.0
"""A longer gap is the host's: from one kernel of a graph to the next it is 1 to 2 us."""

TOP = 12


class Span(NamedTuple):
    """A kernel or a copy on the device, in us."""

    name: str
    begin: float
    end: float


def main() -> None:
    args = _arguments()
    certificate = birth_certificate(args.commit)
    device_thread = DeviceThread()
    variant: Variant = device_thread.run(_opened, args, device_thread)
    try:
        spans, stats = asyncio.run(_recorded(variant.engine, args))
    finally:
        variant.engine.stop()
    row = {"what": "idle", "rate": args.rate, **stats, **idle(spans)}
    rows = [row, *({"what": "kernel", **each} for each in by_name(spans))]
    write(args.out or RESULTS / f"trace-{args.shape}-{args.variant}.json", certificate, rows)
    for each in rows:
        print(
            "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in each.items())
        )
    print(json.dumps(rows))


def _opened(args: argparse.Namespace, device_thread: DeviceThread) -> Variant:
    config = ModelConfig.of(SHAPES[args.shape], args.max_model_len)
    device, scheme = torch.device("cuda"), PRESETS[args.variant]
    loaded = Loaded(random_decoder(config, scheme, torch.float16, device), {}, None)
    return start_variant(
        args.variant,
        loaded,
        Settings(variants=(args.variant,)),
        kv_cache_bytes=cache_budget(device, 1),
        device_thread=device_thread,
        eos_ids=frozenset(),
    )


async def _recorded(engine: Engine, args: argparse.Namespace) -> tuple[list[Span], dict[str, Any]]:
    """What ran on the device for a while under load, and how many steps did."""
    load = asyncio.create_task(_load(engine, args))
    await asyncio.sleep(args.warm_s)
    before = engine.stats()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        await asyncio.sleep(args.seconds)
    after = engine.stats()
    load.cancel()
    steps = after.num_steps - before.num_steps
    running = {"requests_running": after.num_running, "requests_waiting": after.num_waiting}
    if args.trace is not None:
        profiler.export_chrome_trace(str(args.trace))
    return spans_of(profiler.events()), {"steps": steps, **running}


async def _load(engine: Engine, args: argparse.Namespace) -> None:
    rng = random.Random(0)
    vocabulary = range(3, SHAPES[args.shape].vocab_size)
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)

    async def request() -> None:
        async for _ in engine.submit(rng.choices(vocabulary, k=args.prompt), params, "trace"):
            pass

    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(request())
            await asyncio.sleep(rng.expovariate(args.rate))


def spans_of(events: Iterable[Any]) -> list[Span]:
    """The device's events, in order of time."""
    on_device = (event for event in events if event.device_type == DeviceType.CUDA)
    spans = (Span(event.name, event.time_range.start, event.time_range.end) for event in on_device)
    return sorted(spans, key=lambda span: span.begin)


def idle(spans: Sequence[Span]) -> dict[str, float]:
    """Shares of the time from the first span's begin to the last end in which none runs, and the longest such gap."""
    between, within, longest = 0.0, 0.0, 0.0
    end = spans[0].begin
    for span in spans:
        gap = max(0.0, span.begin - end)
        longest = max(longest, gap)
        if gap > GAP_US:
            between += gap
        else:
            within += gap
        end = max(end, span.end)
    whole = end - spans[0].begin
    return {
        "whole_ms": whole / 1e3,
        "idle_share": (between + within) / whole,
        "between_steps_share": between / whole,
        "within_steps_share": within / whole,
        "longest_gap_us": longest,
    }


def by_name(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The names that take most of the time, with their share of it."""
    total_us: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for span in spans:
        total_us[span.name] += span.end - span.begin
        counts[span.name] += 1
    whole = sum(total_us.values())
    top = sorted(total_us, key=lambda name: -total_us[name])[:TOP]
    return [
        {"name": name[:60], "share": total_us[name] / whole, "mean_us": total_us[name] / counts[name]} for name in top
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--variant", default="w8a8", choices=PRESETS)
    parser.add_argument("--rate", type=float, default=28.0, help="requests/s")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--warm-s", type=float, default=3.0, help="seconds of load before the record")
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--trace", type=Path, help="file for the trace itself, to look at in perfetto")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    return parser.parse_args()


if __name__ == "__main__":
    main()
