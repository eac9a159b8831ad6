"""A real Prometheus beside a real server: every query has data, and three alerts are provoked and seen firing.

The rules are a copy with shorter windows (see `tests.support.prometheus`); everything else is what is committed.
MODEL=demo serves the demo model instead of a tiny random one; PICTURE=FILE keeps the picture of the dashboard.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.faults.bench import PROMPTS, Bench
from benchmarks.faults.server import Server
from tests.support.monitoring import GRAFANA, Query, queries
from tests.support.prometheus import BINARY, START_S, Prometheus

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(BINARY is None, reason="prometheus is not installed (Debian: prometheus)"),
]

MODEL = os.environ.get("MODEL", "tiny")
CALM_S, RATE_INTERVAL = (40.0, "10s") if MODEL == "tiny" else (60.0, "20s")
FLOOD_REQUESTS = 64
FLOOD_TOKENS = 300 if MODEL == "tiny" else 80
FIRES_WITHIN_S = 120.0
MAX_MODEL_LEN = 512
KV_TOKENS = 1280
"""Of each variant: so few that the flood needs all."""
DEMO_TOKEN_BYTES = 2 * 4 * 30 * 3 * 64


@dataclass
class Stage:
    """A server, the Prometheus that watches it, and what has happened. seen: alert -> its description when it fired."""

    server: Server
    prometheus: Prometheus
    start_s: float
    end_s: float = 0.0
    statuses: list[int] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)

    async def ask(self, client: httpx.AsyncClient, **body: object) -> None:
        answer = await client.post("/generate", json=body)
        self.statuses.append(answer.status_code)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.server.port}", timeout=300)

    async def until_it_fires(self, alert: str) -> None:
        def fires() -> bool:
            found = self.prometheus.firing()
            self.seen |= {name: each["annotations"]["description"] for name, each in found.items()}
            return alert in self.seen

        await asyncio.to_thread(self.prometheus.until, fires, FIRES_WITHIN_S, f"{alert} fires")


async def calm(stage: Stage) -> None:
    """One request at a time, so that comparisons count; both variants; one answer that the client does not wait for."""
    end_s = time.monotonic() + CALM_S
    async with stage.client() as client:
        for number, prompt in enumerate(cycle(PROMPTS)):
            if time.monotonic() > end_s:
                return
            await stage.ask(client, prompt=prompt, max_tokens=24, compare=True, ignore_eos=True)
            await stage.ask(client, prompt=prompt, max_tokens=16, variant=("w8a8", "fp16")[number % 2])
            await stage.ask(client, prompt=prompt, max_tokens=10**6)


async def flood(stage: Stage) -> None:
    """More requests at once than rows and KV blocks, again and again, until both alerts have been seen."""
    async with stage.client() as client:
        both = ("OttavaTTFTBurnFast", "OttavaKVCacheExhausted")
        alerts: asyncio.Future[Any] = asyncio.gather(*map(stage.until_it_fires, both))
        waiting: set[asyncio.Future[Any]] = set()
        prompts = cycle(PROMPTS)
        while not alerts.done():
            for prompt in islice(prompts, FLOOD_REQUESTS - len(waiting)):
                asking = stage.ask(client, prompt=prompt * 3, max_tokens=FLOOD_TOKENS, ignore_eos=True)
                waiting.add(asyncio.create_task(asking))
            await asyncio.wait([*waiting, alerts], return_when=asyncio.FIRST_COMPLETED)
            waiting = {task for task in waiting if not task.done()}
        await alerts
        for task in waiting:
            task.cancel()


async def kill_engine(stage: Stage) -> None:
    """SIGKILL of the engine's process; it must come back by itself."""
    os.kill(stage.server.engine_pid, signal.SIGKILL)
    await stage.until_it_fires("OttavaEngineRestarted")
    ready = await stage.server.checked()
    assert ready.status_code == 200


def serve(folder: Path) -> Server:
    """The server, on its way up. The demo model is quantized in the user's cache, unless it is there already."""
    arguments = ("--max-model-len", str(MAX_MODEL_LEN), "--max-num-requests", "16", "--speculate", "ngram")
    if MODEL == "tiny":
        return Bench.make(folder, MODEL).serve(*arguments, num_kv_tokens=KV_TOKENS)
    return Server(folder / "server.log", (*arguments, "--kv-cache-bytes", str(KV_TOKENS * DEMO_TOKEN_BYTES)))


class Collector(BaseHTTPRequestHandler):
    """Takes the traces, and forgets them."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[str]:
    """The address of an OpenTelemetry collector."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, collector: str) -> Iterator[Stage]:
    """The whole run: a calm time, a flood, a killed engine, and a calm time again."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
        server = serve(folder)
    with server, Prometheus(folder / "prometheus", f"127.0.0.1:{server.port}") as prometheus:
        asyncio.run(server.checked())
        prometheus.until(prometheus.has_scraped, START_S, "the first scrape")
        made = Stage(server, prometheus, time.time())
        for part in (calm, flood, kill_engine, calm):
            asyncio.run(part(made))
        made.end_s = time.time()
        yield made


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.where)
def test_every_query_of_the_dashboard_has_data(stage: Stage, query: Query) -> None:
    expr = query.filled(rate_interval="5s", range="60s")
    found = stage.prometheus.query_range(expr, stage.start_s, stage.end_s)
    values = [float(value) for series in found for _, value in series["values"]]
    assert any(math.isfinite(value) for value in values), expr


@pytest.mark.parametrize("alert", ["OttavaTTFTBurnFast", "OttavaKVCacheExhausted", "OttavaEngineRestarted"])
def test_three_alerts_were_provoked_and_seen(stage: Stage, alert: str) -> None:
    assert any(letter.isdigit() for letter in stage.seen[alert]), "its description says the value"


def test_the_server_was_seen_down_by_nobody(stage: Stage) -> None:
    """The web answers while its engine is started again."""
    assert not {"OttavaDown", "OttavaAbsent", "OttavaNotReady"} & set(stage.seen)


def test_every_rule_was_evaluated(stage: Stage) -> None:
    assert stage.prometheus.health_of_rules() == {"ok"}


def test_exemplars_lead_to_traces(stage: Stage) -> None:
    series = "ottava_time_to_first_token_seconds_bucket"
    found = stage.prometheus.exemplars(series, stage.start_s, stage.end_s)
    assert found
    assert all(len(bytes.fromhex(exemplar["labels"]["trace_id"])) == 16 for exemplar in found)


def test_the_dashboard_is_drawn_from_what_prometheus_has(stage: Stage, tmp_path: Path) -> None:
    out = Path(os.environ.get("PICTURE", tmp_path / "dashboard.png"))
    times = ("--start", f"{stage.start_s:.0f}", "--end", f"{stage.end_s:.0f}", "--rate-interval", RATE_INTERVAL)
    script = str(GRAFANA / "picture.py")
    command = [sys.executable, script, "--prometheus", stage.prometheus.url, *times, "--out", str(out)]
    subprocess.run(command, check=True)
    assert out.stat().st_size > 50_000
