"""Watches a server during a soak, and judges it at the end.

    python -m benchmarks.load.watch --url http://127.0.0.1:8000 --pid PID --out watch.jsonl &
    python -m benchmarks.load.watch --judge watch.jsonl --results round-*.json

A sample every --every seconds, one JSON line each: memory and open files of the server's process and of its
children (the web and the engine), and every counter and gauge of /metrics. The verdict:

- memory: over the second half of the samples each process grew by at most --max-growth (the first half warms up), pages
  of files apart, which the kernel takes and gives back as it likes;
- files: no more open files at the end than in the middle, 64 aside;
- counters never went back, which would be a process that was replaced; no engine restarted; no run failed;
- at the end nothing runs, nothing waits, and no block of the KV cache is in use;
- every round of `ottava bench` was answered in full.

Exit code 1 if one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import anonymous_mb, children, rss_mb

Sample = dict[str, Any]
IDLE = ("ottava_num_requests_running", "ottava_num_requests_waiting", "ottava_kv_cache_usage_ratio")
BAD_OUTCOMES = ("error", "timeout")
SLACK_FILES = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="process of `ottava serve`; none: only /metrics is watched")
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("watch.jsonl"))
    parser.add_argument("--judge", type=Path, help="samples to judge, instead of watching")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="results of the rounds")
    parser.add_argument("--max-growth", type=float, default=0.05, help="share of a process's memory")
    args = parser.parse_args()
    if args.judge is not None:
        samples = [json.loads(line) for line in args.judge.read_text(encoding="utf-8").splitlines()]
        results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
        return judge(samples, results, args.max_growth)
    watch(args.url, args.pid, args.every, args.out)
    return 0


def watch(url: str, pid: int | None, every_s: float, out: Path) -> None:
    """Write a sample now, one every every_s, and one when it is told to stop."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(1))
    with out.open("w", encoding="utf-8") as file:
        while True:
            file.write(json.dumps(sample(url, pid)) + "\n")
            file.flush()
            if stopped:
                return
            end_s = time.monotonic() + every_s
            while not stopped and time.monotonic() < end_s:
                time.sleep(0.2)


def sample(url: str, pid: int | None) -> Sample:
    """Memory and open files by process, and the values of /metrics; `metrics` is empty where that does not answer."""
    found: Sample = {"time_s": time.time(), "rss_mb": {}, "anonymous_mb": {}, "files": {}, "metrics": {}}
    watched = [] if pid is None else [pid]
    with suppress(OSError):
        watched += [child for parent in watched for child in children(parent)]
    for number, one in enumerate(watched):
        name = "web" if number == 0 else f"engine {number}" if number > 1 else "engine"
        with suppress(OSError, StopIteration):
            found["rss_mb"][name], found["anonymous_mb"][name] = rss_mb(one), anonymous_mb(one)
            found["files"][name] = len(os.listdir(f"/proc/{one}/fd"))
    with suppress(OSError), urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        found["metrics"] = dict(values(answer.read().decode()))
    return found


def values(text: str) -> Iterator[tuple[str, float]]:
    """name{label="value"} -> value, of all but the buckets of histograms."""
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if not one.name.endswith(("_bucket", "_created")):
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(one.labels.items()))
                yield f"{one.name}{{{labels}}}", one.value


def judge(samples: Sequence[Sample], results: Sequence[dict[str, Any]], max_growth: float) -> int:
    """Print each check and its finding. Returns the exit code."""
    checks = [*_memory(samples, max_growth), *_counters(samples), *_rounds(results)]
    for is_good, told in checks:
        print(f"{'ok  ' if is_good else 'FAIL'}  {told}")
    is_good = all(good for good, _ in checks)
    hours = (samples[-1]["time_s"] - samples[0]["time_s"]) / 3600 if samples else 0.0
    print(f"{'PASSED' if is_good else 'FAILED'} after {hours:.2f} h and {len(samples)} samples")
    return 0 if is_good else 1


Check = tuple[bool, str]


def _memory(samples: Sequence[Sample], max_growth: float) -> Iterator[Check]:
    middle, last = samples[len(samples) // 2], samples[-1]
    for name, after in last["anonymous_mb"].items():
        before = middle["anonymous_mb"].get(name, after)
        most = max(one["anonymous_mb"].get(name, 0.0) for one in samples)
        resident = max(one["rss_mb"].get(name, 0.0) for one in samples)
        grown = after / before - 1
        told = f"memory of {name}: {before:.0f} MB at half, {after:.0f} at the end ({grown:+.1%}), {most:.0f} at most"
        told += f"; with files {resident:.0f} at most"
        yield grown <= max_growth, told
        files, before_files = last["files"].get(name, 0), middle["files"].get(name, 0)
        yield files <= before_files + SLACK_FILES, f"open files of {name}: {before_files} at half, {files} at the end"


def _counters(samples: Sequence[Sample]) -> Iterator[Check]:
    told = [one["metrics"] for one in samples if one["metrics"]]
    yield len(told) == len(samples), f"/metrics answered {len(told)} of {len(samples)} times"
    if not told:
        return
    first, last = told[0], told[-1]
    back = {
        name
        for before, after in pairwise(told)
        for name, value in before.items()
        if name.partition("{")[0].endswith(("_total", "_count")) and after.get(name, 0.0) < value
    }
    yield not back, f"counters that went back: {', '.join(sorted(back)) or 'none'}"
    grown = {name: value - first.get(name, 0.0) for name, value in last.items()}
    restarts = sum(value for name, value in grown.items() if name.startswith("ottava_engine_restarts_total"))
    yield restarts == 0, f"engine restarts: {restarts:g}"
    outcomes = {name: value for name, value in grown.items() if name.startswith("ottava_requests_total") and value}
    bad = sum(value for name, value in outcomes.items() if any(f'outcome="{word}"' in name for word in BAD_OUTCOMES))
    yield bad == 0, f"runs by outcome: {', '.join(f'{name} {value:g}' for name, value in outcomes.items()) or 'none'}"
    busy = {name: value for name, value in last.items() if name.startswith(IDLE) and value}
    yield not busy, f"in use at the end: {busy or 'nothing'}"


def _rounds(results: Sequence[dict[str, Any]]) -> Iterator[Check]:
    points = [point for result in results for point in result.get("points", [result])]
    if not points:
        yield False, "no round was measured"
        return
    failed = sum(point["failed"] for point in points)
    completed = sum(point["completed"] for point in points)
    yield failed == 0, f"requests: {completed} answered, {failed} failed, in {len(results)} rounds"
    invalid = sum(not point["ottava"]["valid"] for point in points)
    yield True, f"points whose generator was late: {invalid} (their latencies do not count)"
    p99s = [point["p99_ttft_ms"] for point in points if point["p99_ttft_ms"] is not None]
    if p99s:
        told = f"{p99s[0]:.0f} ms in the first, {p99s[-1]:.0f} in the last, {max(p99s):.0f} at most"
        yield True, f"TTFT p99 of the rounds: {told}"


if __name__ == "__main__":
    sys.exit(main())
