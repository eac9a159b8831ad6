"""What a load costs in GPUs: `simulation` over measured steps, checked against measured loads first.

    python -m benchmarks.capacity                          all parts, some minutes on one core
    python -m benchmarks.capacity --parts check            how far simulated loads are from measured ones
    python -m benchmarks.capacity --parts gpus --rates 50  replicas for 50 requests/s

Needs no GPU and starts no server: all that it takes is in `benchmarks/results/`, and each row of `inputs` says where it
is from. The last line printed is JSON. The exit code is 1 if a check is further off than --tolerance.

- check: a burst of 512 requests (GPU), random arrivals (GPU, CPU), one to four replicas that share two cores.
- gpus: the fewest replicas that keep the SLO, for each variant and rate, with steps as they were measured and, a
  what-if, with steps with prompt tokens that the host need not launch. A gateway is added for every --busy of a core.
- affinity: what-if. First tokens and hits of a prefix cache, which the engine does not have, by the bound on load.
- spread: whether more replicas behave as the few that are simulated in their place.
- choice: time of the gateway's choice among so many replicas, measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.simulation import Limits, Load, Plant, Result, StepTimes, Work, simulate
from service.cluster.prefixes import KnownPrefixes, ranked
from service.measures import percentile

Row = dict[str, Any]

PARTS = ("check", "gpus", "spread", "affinity", "choice")
VARIANTS = ("fp16", "w8a8")
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128
GPU, DEMO, SMALL = "serving-llama-3.1-8b-h100", "serving-demo-cpu", "serving-small-cpu"
WARM_S = 8.0
STEPS = {"as measured": True, "replayed": False}
"""Whether a step with prompt tokens waits for the host's launches. It does today."""

GIB = 2**30
GPU_BYTES = 79.1 * GIB
"""What CUDA calls the memory of an H100 with 80 GB. An assumption, as is what the weights of Llama-3.1-8B take."""

WEIGHT_BYTES = {"fp16": 16.06e9, "w8a8": 9.08e9}
BLOCK_BYTES = 64 * 2 * 32 * 8 * 128 * 2
"""64 tokens: keys and values of 32 layers, 8 heads of 128 channels, float16."""

KV_SHARE = 0.9
"""See `service.host.memory`."""

MAX_NUM_REQUESTS, MAX_BATCHED_TOKENS = 256, 2048
SLICE = 4
"""Replicas simulated at most. More of them under the same gateway behave alike: part `spread`."""

TRAFFIC = {4: (69.4, 174.7, 4.14, 6.16), 12: (103.7, 180.0, 7.51, 13.58), 20: (127.8, 209.0, 16.3, 23.1)}
"""docs/measurements/traffic.md, w8a8: requests/s -> first token p50, p99, time per token p50, p99, all in ms."""

CONTENDED = 20
"""Requests/s from which, in the one process that was measured there, streams and launches wanted the same lock."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits on what clients see, in ms: p99 of first tokens, p99 of all gaps between tokens."""

    ttft_ms: float
    itl_ms: float

    @classmethod
    def read(cls, text: str) -> Slo:
        """From "500:100"."""
        ttft, _, itl = text.partition(":")
        return cls(float(ttft), float(itl))

    def holds(self, result: Result) -> bool:
        if result.answered < result.sent or not result.first:
            return False
        return result.first_s(99) * 1e3 <= self.ttft_ms and result.gap_s(99) * 1e3 <= self.itl_ms


def read(name: str) -> Row:
    found: Row = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def step_times(name: str, variant: str, launch_s: float = 0.0) -> StepTimes:
    """The table of a result of `benchmarks.serving`.

    A step reads a prompt no faster than one row decodes. Between that and the measured prompts it is linear in tokens.
    """
    rows = [row for row in read(name)["rows"] if row["variant"] == variant]
    decode = tuple((row["batch"], row["itl_ms_p50"] / 1e3) for row in rows if row["what"] == "decode")
    budget = 8192 if name == GPU else 512
    prompts = {}
    for row in rows:
        if row["what"] == "prefill":
            tokens = min(row["batch"] * row["prompt"], budget)
            prompts[tokens] = tokens / row["tokens_per_s"]
    points = sorted(prompts.items())
    if len(points) == 1:
        ((tokens, seconds),) = points
        rate = tokens / seconds
        points = [(0, decode[0][1]), (decode[0][1] * rate, decode[0][1]), (tokens, seconds)]
    return StepTimes(decode, tuple(points), launch_s)


def launch_s() -> float:
    """What the first token of a lone request waits for at least: the launches of its step, a constant of the host."""
    rows = read("overhead-llama-3.1-8b-h100")["rows"]
    found = next(row for row in rows if (row["what"], row["way"]) == ("first token", "engine alone"))
    return float(found["ms_p50"]) / 1e3


def gpu_web() -> Work:
    """The web process of a replica: what a request waits for it, and its event loop's time per token."""
    first = read("overhead-llama-3.1-8b-h100")["rows"]
    tokens = read("overhead-llama-3.1-8b-64-h100")["rows"]
    added_ms = next(row["added_ms_p50"] for row in first if row["way"] == "/v1/completions, token ids")
    token_us = next(row["event_loop_us_per_token"] for row in tokens if row["way"] == "/v1/completions")
    return Work(added_ms / 1e3, token_us / 1e6)


def process_costs() -> dict[str, Work]:
    """Processor time of each process of a cluster, by what it does (`benchmarks.cluster --parts costs`)."""
    rows = read("cluster-costs-cpu")["rows"]
    return {
        row["role"]: Work(row["ms_per_request"] / 1e3, row["ms_per_token"] / 1e3)
        for row in rows
        if row["part"] == "costs"
    }


def num_blocks(variant: str) -> int:
    """Blocks of the KV cache of one variant on one GPU, with the room that a reload needs."""
    return int((GPU_BYTES - 2 * WEIGHT_BYTES[variant]) * KV_SHARE / BLOCK_BYTES)


def gpu_plant(variant: str, replicas: int, steps: str = "as measured", gateways: int = 1) -> Plant:
    """Replicas of Llama-3.1-8B with one H100 each, behind gateways."""
    times = step_times(GPU, variant, launch_s() if STEPS[steps] else 0.0)
    limits = Limits(MAX_NUM_REQUESTS, MAX_BATCHED_TOKENS, num_blocks(variant))
    gateway = process_costs()["gateway"]
    return Plant(replicas, times, limits, gateway=gateway, web=gpu_web(), gateways=gateways)


def inputs() -> list[Row]:
    """What the simulation takes, and where each figure is from."""
    gateway, web = process_costs()["gateway"], gpu_web()
    found: list[tuple[str, Any, str]] = [
        ("steps", {variant: asdict(step_times(GPU, variant)) for variant in VARIANTS}, f"measured: {GPU}.json"),
        ("steps of fewer than 8192 prompt tokens", "in proportion", "assumption"),
        ("rows beside prompt tokens", "add what they add to one row", "assumption"),
        ("launch_s of w8a8", launch_s(), "measured: overhead-llama-3.1-8b-h100.json, a lone first token"),
        ("launch_s of fp16", launch_s(), "assumption: as w8a8's"),
        ("web", asdict(web), "measured: overhead-llama-3.1-8b-h100.json (request), -64-h100.json (token)"),
        ("gateway", asdict(gateway), "measured: cluster-costs-cpu.json, on another processor than a GPU's host"),
        ("blocks", {variant: num_blocks(variant) for variant in VARIANTS}, "assumption: arithmetic from sizes"),
        ("arrivals", "Poisson", "assumption"),
        ("network", 0.0, "assumption"),
        ("loads that the gateway knows", "at once and exactly", "assumption: Ray's are up to a lease old"),
    ]
    return [{"part": "inputs", "what": what, "value": value, "from": source} for what, value, source in found]


def check(args: argparse.Namespace) -> list[Row]:
    """Simulated over measured, for each load that has been measured."""
    return [*_check_burst(), *_check_traffic(4 * args.seconds), *_check_arrivals(args.seconds), *_check_replicas()]


def _compared(load: str, figure: str, measured: float, simulated: float, is_held: bool = True) -> Row:
    """is_held: the exit code depends on it."""
    row = {"part": "check", "load": load, "figure": figure, "measured": measured, "simulated": simulated}
    return row | {"ratio": simulated / measured, "is_held": is_held}


def _check_burst() -> list[Row]:
    rows = []
    for found in (row for row in read(GPU)["rows"] if row["what"] == "burst"):
        load = Load(found["prompt"], found["max_tokens"], seconds=1e9, burst=found["batch"])
        plant = Plant(1, step_times(GPU, found["variant"]), Limits(256, 8192))
        result = simulate(plant, load)
        speed = found["batch"] * found["max_tokens"] / result.end_s
        name = f"H100, engine alone, {found['batch']} at once, {found['variant']}"
        rows.append(_compared(name, "tokens/s", found["tokens_per_s"], speed))
    return rows


def _check_traffic(seconds: float) -> list[Row]:
    rows = []
    plant = replace(gpu_plant("w8a8", 1), gateway=Work())
    for rate, measured in TRAFFIC.items():
        result = simulate(plant, Load(PROMPT_TOKENS, OUTPUT_TOKENS, seconds + WARM_S, rate=rate, warm_s=WARM_S))
        name = f"H100, one process, {rate} requests/s, w8a8"
        rows += [
            _compared(name, figure, of, simulated, is_held=rate < CONTENDED)
            for (figure, simulated), of in zip(_figures(result).items(), measured, strict=True)
        ]
    return rows


def _figures(result: Result) -> dict[str, float]:
    found = {f"first token p{q}, ms": result.first_s(q) * 1e3 for q in (50, 99)}
    return found | {f"per token p{q}, ms": result.per_token_s(q) * 1e3 for q in (50, 99)}


def _check_arrivals(seconds: float) -> list[Row]:
    """The demo model on two cores, one replica without a gateway: 32 tokens in, 16 out.

    Not held: the steps were measured on another day than the load, when a lone token took half as long.
    """
    rows = []
    for point in read("load-demo-cpu")["points"]:
        variant, rate = point["model_id"], point["request_rate"]
        plant = Plant(1, step_times(DEMO, variant), Limits(64, 512, plans_ahead=False))
        result = simulate(plant, Load(32, 16, 20 * seconds, rate=rate))
        names = [f"{quantile}_{what}_ms" for what in ("ttft", "tpot") for quantile in ("p50", "p99")]
        rows += [
            _compared(f"demo model, CPU, {rate:g} requests/s, {variant}", figure, point[name], simulated, is_held=False)
            for (figure, simulated), name in zip(_figures(result).items(), names, strict=True)
        ]
    return rows


def _check_replicas() -> list[Row]:
    """Replicas, gateway, Ray and clients of a small model on two cores: 8 clients, 48 tokens, prompts of 101 bytes."""
    costs = process_costs()
    rows = []
    for found in (row for row in read("cluster-scaling-cpu")["rows"] if row["part"] == "scaling"):
        plant = Plant(
            found["replicas"],
            step_times(SMALL, "w8a8"),
            Limits(8, 512, plans_ahead=False),
            clients=costs["clients"],
            gateway=costs["gateway"],
            lease=costs["Ray"],
            web=costs["replica"],
            cores=2,
        )
        simulated = simulate(plant, Load(101, 48, 22.0, clients=found["streams"], warm_s=2.0))
        name = f"{found['replicas']} replicas on two cores"
        rows.append(_compared(name, "tokens/s", found["tokens_per_s"], simulated.tokens_per_s))
        first, gap = found["first_token_ms"]["p50"], found["between_events_ms"]["p50"]
        rows.append(_compared(name, "first token p50, ms", first, simulated.first_s(50) * 1e3))
        rows.append(_compared(name, "between events p50, ms", gap, simulated.gap_s(50) * 1e3))
    return rows


def gpus(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for slo in map(Slo.read, args.slo):
        for steps in STEPS:
            for variant in VARIANTS:
                asked = {"part": "gpus", "slo": asdict(slo), "steps": steps, "variant": variant}
                best = most(variant, steps, slo, args)
                rows.append(asked | {"rate": None, "most_each": best})
                rates = args.rates if best and slo == Slo.read(args.slo[0]) else []
                rows += [asked | fewest(variant, steps, slo, rate, best, args) for rate in rates]
    return rows


def most(variant: str, steps: str, slo: Slo, args: argparse.Namespace) -> float:
    """Requests/s per replica that a slice of replicas keeps up with; 0 if it cannot keep the SLO at any load."""
    low, high = 0.0, 96.0
    while high - low > max(0.03 * high, 1.0):
        rate = (low + high) / 2
        result = _in_slice(variant, steps, rate * SLICE, SLICE, args)
        low, high = (rate, high) if slo.holds(result) else (low, rate)
    return low


def fewest(variant: str, steps: str, slo: Slo, rate: float, most_each: float, args: argparse.Namespace) -> Row:
    """The fewest replicas that keep the SLO at this rate, and what clients see of them."""
    count = max(1, int(0.95 * rate / most_each))
    step = max(1, count // 100)
    while not slo.holds(result := _in_slice(variant, steps, rate, count, args)):
        count += step
    return {
        "rate": rate,
        "gpus": count,
        "gateways": gateways_for(rate, args.busy),
        "simulated_replicas": min(count, SLICE),
        "rate_per_gpu": rate / count,
        "in_flight_per_gpu": result.in_flight / min(count, SLICE),
        "kv_share": result.in_flight / min(count, SLICE) * blocks_of_one() / num_blocks(variant),
        "web_busy": result.busy["webs"],
        "gateway_busy": result.busy["gateways"],
        "itl_p50_ms": result.gap_s(50) * 1e3,
        "itl_p99_ms": result.gap_s(99) * 1e3,
    } | _figures(result)


def blocks_of_one() -> int:
    return -(-(PROMPT_TOKENS + OUTPUT_TOKENS) // 64)


def gateways_for(rate: float, busy: float) -> int:
    """Gateways, each a core that is busy for at most this share of the time."""
    work = process_costs()["gateway"]
    return max(1, math.ceil(rate * (work.per_request_s + OUTPUT_TOKENS * work.per_token_s) / busy))


def _in_slice(variant: str, steps: str, rate: float, replicas: int, args: argparse.Namespace) -> Result:
    """These replicas, or a slice of them with its share of the requests and of the gateways."""
    share = min(1.0, SLICE / replicas)
    plant = gpu_plant(variant, round(replicas * share), steps, gateways_for(rate * share, args.busy))
    return simulate(plant, Load(PROMPT_TOKENS, OUTPUT_TOKENS, args.seconds + WARM_S, rate=rate * share, warm_s=WARM_S))


def spread(args: argparse.Namespace) -> list[Row]:
    """Whether more replicas behave as a slice of them: 1 to 16 at the same load each, `w8a8`, replayed."""
    rows = []
    for replicas in (1, 2, 4, 8, 16):
        rate = args.spread_rate * replicas
        plant = gpu_plant("w8a8", replicas, "replayed", gateways_for(rate, args.busy))
        load = Load(PROMPT_TOKENS, OUTPUT_TOKENS, args.seconds + WARM_S, rate=rate, warm_s=WARM_S)
        result = simulate(plant, load)
        rows.append({"part": "spread", "replicas": replicas, "rate": rate} | _figures(result))
    return rows


def affinity(args: argparse.Namespace) -> list[Row]:
    """Eight replicas, 64 prefixes of 384 of the 512 tokens, each replica with room for 16 of them.

    Behind as many gateways as the load needs, each of which knows its own requests, and behind one that takes no time.
    """
    rows = []
    rate = 8 * args.affinity_rate
    load = Load(512, 128, args.seconds + WARM_S, rate=rate, warm_s=WARM_S, prefixes=64, prefix_tokens=384)
    for gateways in (gateways_for(rate, args.busy), 1):
        for bound in (0, 4, 16, 64):
            plant = gpu_plant("w8a8", 8, "replayed", gateways)
            limits = replace(plant.limits, cached_prefixes=16)
            gateway = Work() if gateways == 1 else plant.gateway
            result = simulate(replace(plant, affinity_bound=bound, limits=limits, gateway=gateway), load)
            row = {"part": "affinity", "gateways": gateways, "bound": bound, "rate": rate, "replicas": 8}
            row |= {"hits": result.prefix_hits / result.num_requests, "engine_busy": result.busy["engines"]}
            rows.append(row | _figures(result))
    return rows


def choice(args: argparse.Namespace) -> list[Row]:
    """Time of one choice of a replica in the gateway's process, and how long its memory of prefixes reaches."""
    rows = []
    for replicas in (10, 100, 1000):
        names = [str(number) for number in range(replicas)]
        known, keys = KnownPrefixes(), [bytes([number]) for number in range(PROMPT_TOKENS // 64)]
        for name in names[: replicas // 2]:
            known.add(keys, name)
        draw = random.Random(0)
        times = []
        for _ in range(args.choices):
            loads = {name: draw.randrange(64) for name in names}
            start_s = time.perf_counter()
            ranked(loads, known.lengths(keys, names), 16)
            times.append(time.perf_counter() - start_s)
        rows.append({"part": "choice", "replicas": replicas, "us_p50": percentile(times, 50) * 1e6})
    return rows


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rates", nargs="+", type=float, default=[10, 100, 1000, 10_000], help="requests/s")
    parser.add_argument("--slo", nargs="+", default=["500:100", "200:25"], help="ms: p99 of TTFT, p99 of ITL")
    parser.add_argument("--busy", type=float, default=0.5, help="of a gateway's core at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="of simulated load")
    parser.add_argument("--spread-rate", type=float, default=40.0, help="requests/s per replica of `spread`")
    parser.add_argument("--affinity-rate", type=float, default=70.0, help="requests/s per replica of `affinity`")
    parser.add_argument("--choices", type=int, default=200, help="of a replica that are timed")
    parser.add_argument("--tolerance", type=float, default=0.5, help="of a check, as a share of what was measured")
    parser.add_argument("--commit", help="where the tree carries no git history")
    parser.add_argument("--out", type=Path, default=RESULTS / "capacity.json")
    return parser.parse_args(argv)


def main() -> int:
    args = arguments()
    certificate = birth_certificate(args.commit) | {"simpy": version("simpy")}
    rows = inputs()
    for part in args.parts:
        found = MEASURES[part](args)
        print(*map(json.dumps, found), sep="\n", file=sys.stderr)
        rows += found
    write(args.out, certificate, rows)
    print(json.dumps(rows))
    checks = [row for row in rows if row["part"] == "check" and row["is_held"]]
    return int(any(abs(row["ratio"] - 1) > args.tolerance for row in checks))


MEASURES = {"check": check, "gpus": gpus, "spread": spread, "affinity": affinity, "choice": choice}

if __name__ == "__main__":
    sys.exit(main())
