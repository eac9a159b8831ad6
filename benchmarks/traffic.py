"""What clients see of ottava under load, and of another server beside it: one checkpoint, one client, one run.

    python -m benchmarks.traffic --shape llama-3.1-8b
    python -m benchmarks.traffic --shape llama-3.1-8b --peer vllm "vllm serve {folder} --port {port}"

Servers are started one after the other, loaded by `ottava bench`, and stopped. The points:

    latency, latency:N         requests one after the other, of --input-len or N prompt tokens
    rate:R:S                   R requests/s at random times, for S seconds
    burst:N                    N requests at once
    reading:N:COUNT            16 streams while COUNT prompts of N tokens are read
    turns:N                    conversations of four turns, one after the other, that share N tokens of a system prompt
    saturation:LOW:HIGH:S      the highest of six bisected rates at which 99 % of requests meet SLOS, for S seconds each

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import free_port, served
from benchmarks.random_checkpoint import write_checkpoint, write_without_weights
from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.shapes import SHAPES

POINTS = "latency,latency:16,rate:4:12,rate:12:12,rate:20:12,rate:28:12,burst:256,reading:3500:8,turns:1000"
SLOS = ("ttft:200", "tpot:20")
GOOD_SHARE = 0.99
BISECTIONS = 6
READERS, READ_TOKENS = 16, 768
"""Streams beside which prompts are read, and how many tokens each of them gets."""
TURNS, TURN_LEN, TURN_OUTPUT = 4, 64, 32
START_S = 400.0
OURS = "ottava"
TIMES = ("ttft", "tpot", "itl")
LOWER = tuple(f"{quantile}_{time}_ms" for time in TIMES for quantile in ("median", "p99"))
HIGHER = ("output_throughput",)


@dataclass(frozen=True, slots=True)
class Program:
    """A server to load.

    command: how to start it, with {folder} and {port}.   ready: the path that says that it serves.
    """

    name: str
    command: str
    ready: str


def main() -> int:
    args = _arguments()
    certificate = birth_certificate(args.commit) | {"peer": args.peer[1] if args.peer else None}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "checkpoint"
        if (folder / "config.json").exists():
            _tell(f"{folder} is there already")
        elif args.random_weights:
            write_without_weights(folder, args.shape, is_int8=False, max_model_len=args.max_model_len)
        else:
            num_bytes = write_checkpoint(folder, args.shape, is_int8=not args.float, max_model_len=args.max_model_len)
            _tell(f"wrote a checkpoint of {num_bytes / 1e9:.1f} GB")
        rows: list[dict[str, Any]] = []
        for program in _programs(args):
            with _served(program, folder, Path(args.logs or scratch)) as (port, started_s):
                certificate[f"{program.name} started in s"] = round(started_s, 1)
                load = Loader(program.name, port, args, Path(scratch))
                rows += [row for point in args.points.split(",") for row in load.measured(point)]
                if program.name == OURS:
                    certificate |= load.step_counts()
            # After each server: the next one may not start.
            add_ratios(rows)
            certificate |= {f"{server} serves requests/s": rate for server, rate in served_rates(rows).items()}
            write(args.out or RESULTS / f"traffic-{args.shape}.json", certificate, rows)
    print(table(rows))
    print(json.dumps(rows))
    return 0 if all(row["failed"] == 0 for row in rows) else 1


def _programs(args: argparse.Namespace) -> list[Program]:
    variant = "fp16" if args.float else "w8a8"
    command = [sys.executable, "-m", "service", "serve", "{folder}", "--variants", variant, "--port", "{port}"]
    command += ["--random-weights"] if args.random_weights else []
    ours = f"{shlex.join(command)} {args.serve}"
    programs = [Program(OURS, ours, "/ready")]
    return programs + ([Program(args.peer[0], args.peer[1], args.peer_ready)] if args.peer else [])


@contextmanager
def _served(program: Program, folder: Path, logs: Path) -> Iterator[tuple[int, float]]:
    """Start a server and wait until it is ready: (port, seconds that took). It is ended in any case.

    Raises:
        RuntimeError: it ended before, or is not ready within START_S.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    words = [word.format(folder=folder, port=port) for word in shlex.split(program.command)]
    ready_url = f"http://127.0.0.1:{port}{program.ready}"
    with served(words, ready_url, logs / f"{program.name}.log", START_S) as started_s:
        _tell(f"{program.name} is ready after {started_s:.1f} s")
        yield port, started_s


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads one server with `ottava bench`."""

    name: str
    port: int
    args: argparse.Namespace
    scratch: Path

    def measured(self, point: str) -> list[dict[str, Any]]:
        """The rows of a point: one, and of a saturation one for each rate."""
        kind, *numbers = read_point(point)
        if kind != "saturation":
            return [self._row(point, self._words(kind, numbers))]
        low, high, seconds = numbers
        rows: list[dict[str, Any]] = []
        for _ in range(BISECTIONS):
            rate = round((low * high) ** 0.5, 1)
            words = ["--rate", f"{rate:g}", "--seconds", f"{seconds:g}", "--goodput", *SLOS]
            row = self._row(point, self._sizes() + words) | {"rate": rate}
            row["is_served"] = row["good_requests"] >= GOOD_SHARE * (row["completed"] + row["failed"])
            low, high = (rate, high) if row["is_served"] else (low, rate)
            rows.append(row)
        return rows

    def step_counts(self) -> dict[str, float]:
        """How many steps ottava has run, and launched late."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        names = "ottava_steps_total", "ottava_late_steps_total"
        return {name: sum(each.value for each in samples if each.name == name) for name in names}

    def _words(self, kind: str, numbers: Sequence[float]) -> list[str]:
        """The words of `ottava bench` for a point."""
        match kind, [f"{number:g}" for number in numbers]:
            case "latency", sizes:
                sizes = [*self._sizes(), "--input-len", *sizes] if sizes else self._sizes()
                return [*sizes, "--concurrency", "1", "--requests", "24"]
            case "rate", [rate, seconds]:
                return [*self._sizes(), "--rate", rate, "--seconds", seconds]
            case "burst", [count]:
                return [*self._sizes(), "--burst", count]
            case "reading", [_, count]:
                lines = self.scratch / "reading.jsonl"
                write_reading(lines, int(numbers[0]), int(count), self.args.shape)
                return ["--dataset", str(lines), "--warmup", "0", "--burst", str(READERS + int(count))]
            case "turns", [shared]:
                words = ["--prefixes", f"1:{shared}", "--turns", str(TURNS), "--concurrency", "1", "--requests", "24"]
                return [*words, "--input-len", str(TURN_LEN), "--output-len", str(TURN_OUTPUT)]
        raise AssertionError(kind)

    def _sizes(self) -> list[str]:
        return ["--input-len", str(self.args.input_len), "--output-len", str(self.args.output_len)]

    def _row(self, point: str, words: Sequence[str]) -> dict[str, Any]:
        out = self.scratch / "point.json"
        command = [sys.executable, "-m", "service", "bench", "--url", f"http://127.0.0.1:{self.port}"]
        with Path(os.devnull).open("wb") as nowhere:
            subprocess.run([*command, "--json", str(out), *words], check=True, stdout=nowhere)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        kept = ("completed", "failed", "duration", "request_throughput", *LOWER, *HIGHER)
        row = {"server": self.name, "point": point} | {key: found[key] for key in kept}
        own = found["ottava"]
        row |= {"good_requests": own["good_requests"], "cached_share": cached_share(found)}
        _tell(json.dumps({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}))
        return row | {"is_valid": own["valid"], "why_invalid": own["why_invalid"]}


def read_point(point: str) -> tuple[Any, ...]:
    """A point's kind and its numbers.

    Raises:
        ValueError: it is no point.
    """
    kind, *rest = point.split(":")
    counts = {"latency": (0, 1), "rate": (2,), "burst": (1,), "reading": (2,), "turns": (1,), "saturation": (3,)}
    try:
        numbers = [float(word) for word in rest]
    except ValueError:
        numbers = []
    if len(numbers) != len(rest) or len(rest) not in counts.get(kind, ()) or min(numbers, default=1) <= 0:
        raise ValueError(
            f"{point!r} is no point; use latency, rate:REQUESTS_PER_S:SECONDS, burst:REQUESTS or see --help"
        )
    return kind, *numbers


def write_reading(path: Path, prompt_len: int, count: int, shape: str) -> None:
    """Write the requests of a reading as a dataset: streams of short prompts, then long prompts of two tokens each."""
    rng = random.Random(0)
    vocabulary = range(3, SHAPES[shape].vocab_size)
    sizes = [(32, READ_TOKENS)] * READERS + [(prompt_len, 2)] * count
    lines = [{"prompt": rng.choices(vocabulary, k=length), "max_tokens": tokens} for length, tokens in sizes]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def cached_share(found: dict[str, Any]) -> float | None:
    """Share of the prompt tokens that the server says it found in its cache; None where it says nothing."""
    cached = found["ottava"]["cached_input_tokens"]
    return None if cached is None else cached / found["total_input_tokens"]


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add to ottava's rows how much better it is than the peer, above 1 is better: times of the peer over its own."""
    peers = {row["point"]: row for row in rows if row["server"] != OURS and "rate" not in row}
    for row in rows:
        peer = peers.get(row["point"])
        if row["server"] != OURS or peer is None:
            continue
        for key in LOWER:
            row[f"better_{key}"] = peer[key] / row[key] if row[key] and peer[key] else None
        for key in HIGHER:
            row[f"better_{key}"] = row[key] / peer[key] if peer[key] else None


def served_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Server -> the highest rate that it served within the SLOs; 0 if none, and none at all without a saturation."""
    found: dict[str, float] = {}
    for row in rows:
        if "rate" in row:
            found[row["server"]] = max(found.get(row["server"], 0.0), row["rate"] if row["is_served"] else 0.0)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a point and server, milliseconds."""
    head = (
        f"{'point':<14}{'server':<10}{'ok':>5}{'out/s':>9}{'TTFT p50/p99':>18}{'TPOT p50/p99':>16}{'ITL p50/p99':>16}"
    )
    lines = [head]
    for point in dict.fromkeys(row["point"] for row in rows):
        for row in (row for row in rows if row["point"] == point):
            times = [f"{row[f'median_{time}_ms']:.1f}/{row[f'p99_{time}_ms']:.1f}" for time in TIMES]
            name = f"{row['rate']:g}/s {'+' if row['is_served'] else '-'}" if "rate" in row else point
            lines.append(
                f"{name:<14}{row['server']:<10}{row['completed']:>5}{row['output_throughput']:>9.0f}"
                f"{times[0]:>18}{times[1]:>16}{times[2]:>16}"
            )
    lines += [f"{server} serves {rate:g}/s within {' '.join(SLOS)}" for server, rate in served_rates(rows).items()]
    return "\n".join(lines)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--folder", type=Path, help="checkpoint to serve; written if it does not exist")
    parser.add_argument("--float", action="store_true", help="float16 weights: compare the baselines")
    parser.add_argument("--random-weights", action="store_true", help="write no weights; for ottava alone")
    parser.add_argument("--points", default=POINTS, type=_points)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--serve", default="", help="more flags of `ottava serve`")
    parser.add_argument("--peer", nargs=2, metavar=("NAME", "COMMAND"))
    parser.add_argument("--peer-ready", default="/health", metavar="PATH", help="what the peer answers once it serves")
    parser.add_argument("--logs", help="folder for what the servers write")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    args = parser.parse_args()
    if args.random_weights and args.peer:
        parser.error("--random-weights is for ottava alone: a peer needs weights to load")
    return args


def _points(text: str) -> str:
    for point in text.split(","):
        read_point(point)
    return text


if __name__ == "__main__":
    sys.exit(main())
