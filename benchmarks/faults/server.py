"""A server process: started, watched from outside, and always ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import children, free_port, rss_mb

ROOT = Path(__file__).parents[2]
START_S = 240.0
POLL_S = 0.05
SETTLE_S = 20.0
OTTAVA = ("service",)


class Server:
    """`ottava serve` on a loopback port; a context manager that kills it in any case.

    Args:
        log: file that takes what it writes.
        arguments: of `ottava serve`, the port aside.
        program: what `python -m` runs, with the arguments before `serve`.
    """

    def __init__(self, log: Path, arguments: Sequence[str], program: Sequence[str] = OTTAVA) -> None:
        self.port = free_port()
        self.log = log
        self.num_variants = 1 if "--variants" in arguments else 2
        command = [sys.executable, "-m", *program, "serve", *arguments, "--port", str(self.port)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=environment())

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        """What it wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def engine_pid(self) -> int:
        """The process of its engines, its only child."""
        (child,) = children(self.process.pid)
        return child

    @property
    def rss_mb(self) -> float:
        """Resident memory of both processes."""
        return rss_mb(self.process.pid) + rss_mb(self.engine_pid)

    async def get(self, path: str) -> httpx.Response:
        """One GET on a connection of its own."""
        async with httpx.AsyncClient(timeout=30) as client:
            return await client.get(f"http://127.0.0.1:{self.port}{path}")

    async def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """What /generate answers, which must be 200."""
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(f"http://127.0.0.1:{self.port}/generate", json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    async def checked(self) -> httpx.Response:
        """What /ready answers once the self-check is done.

        Raises:
            RuntimeError: the process ended before, or is not done within START_S.
        """
        for _ in range(int(START_S / POLL_S)):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: {self.said[-500:]}")
            try:
                ready = await self.get("/ready")
            except httpx.TransportError:
                ready = None
            if ready is not None and not self._is_starting(ready):
                return ready
            await asyncio.sleep(POLL_S)
        raise RuntimeError(f"the server was not ready within {START_S:g} s: {self.said[-500:]}")

    def _is_starting(self, ready: httpx.Response) -> bool:
        """During the start /ready says the same of every variant; one that was refused has a reason of its own."""
        if ready.status_code == 200:
            return False
        reasons = list(ready.json()["variants"].values())
        return len(reasons) == self.num_variants and len(set(reasons)) == 1

    async def metrics(self) -> dict[tuple[str, ...], float]:
        """(name, label=value, ...) -> value."""
        text = (await self.get("/metrics")).text
        return {
            (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def total(self, name: str, *labels: str) -> float:
        """The sum of a series over all labels but those given."""
        return sum(
            value
            for (found, *others), value in (await self.metrics()).items()
            if found == name and {*labels} <= {*others}
        )

    async def blocks_in_use(self, within_s: float = SETTLE_S) -> float:
        """The largest share of KV blocks in use, once nobody runs or waits any more, or within_s have passed."""
        names = ("ottava_num_requests_running", "ottava_num_requests_waiting", "ottava_kv_cache_usage_ratio")
        loop = asyncio.get_running_loop()
        end_s = loop.time() + within_s
        while True:
            metrics = await self.metrics()
            found = [value for (name, *_), value in metrics.items() if name in names]
            if not any(found) or loop.time() > end_s:
                return max(value for (name, *_), value in metrics.items() if name == names[-1])
            await asyncio.sleep(POLL_S)

    async def ended(self, within_s: float) -> int | None:
        """Its exit code; None where it still runs after within_s."""
        try:
            return await asyncio.to_thread(self.process.wait, within_s)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def environment() -> dict[str, str]:
    """This process's environment without settings of ottava, off the network, with one thread for a small model."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTTAVA_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


def run_command(*arguments: str, limit_s: float = START_S) -> subprocess.CompletedProcess[str]:
    """A command of ottava, to its end."""
    command = [sys.executable, "-m", *OTTAVA, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=limit_s
    )
