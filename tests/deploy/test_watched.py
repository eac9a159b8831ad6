"""The composed service with what watches and loads it: Prometheus, Alertmanager, the profile loadtest, other clients.

Run by `make test-deploy`. RATES are those of the load test. guidellm runs where it is in PATH, and PICTURE=FILE keeps
a picture of the dashboard. With STAND_INS=1 programs of this machine stand for the images that cannot be pulled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.deploy.engine import (
    ALERTMANAGER,
    CPU_IMAGE,
    PROJECT,
    PROMETHEUS,
    URL,
    WARM_S,
    Stack,
    Told,
    ask_to_compare,
    build_of_this_machine,
    docker,
    get,
    has_stand_ins,
    output_of,
    seconds_until,
)
from tests.support.monitoring import GRAFANA, Query, queries

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]

RATES = os.environ.get("RATES", "0.5,1,2")
SCRAPE_S = 15.0
RESULT = "/results/loadtest.json"
FIRES_WITHIN_S = 120.0
PROGRAMS = {
    "prometheus": (("prometheus", "promtool"), "/prometheus"),
    "alertmanager": (("prometheus-alertmanager", "amtool"), "/alertmanager"),
}
"""service -> programs of Debian's package that stand for its image, and the folder that it writes."""

ENGINE = """
import os, signal
from pathlib import Path
def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
def is_python(pid):
    return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal() and int(path.name) != os.getpid()]
web = next(pid for pid in sorted(pids) if is_python(pid))
os.kill(next(pid for pid in sorted(pids) if is_python(pid) and parent(pid) == web), signal.SIGKILL)
"""
"""Run in the container, kills the engine's process: the child of the web's."""


@dataclass
class Load:
    """What the load test told, and when it ran."""

    points: list[dict[str, Any]]
    start_s: float
    end_s: float


def asked(path: str, **parameters: object) -> list[dict[str, Any]]:
    """The result of a query of Prometheus."""
    status, body = get(f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}", PROMETHEUS)
    assert status == 200, body
    result = json.loads(body)["data"]["result"]
    assert isinstance(result, list)
    return result


@pytest.fixture(scope="module")
def watched(stack: Stack, cold_s: float) -> Stack:
    """The service, Prometheus and Alertmanager, all of them healthy."""
    if has_stand_ins():
        for service, (programs, folder) in PROGRAMS.items():
            found = [shutil.which(program) for program in programs]
            if None in found:
                pytest.skip(f"{' or '.join(programs)} is missing in PATH, of which an image for this machine is made")
            build_of_this_machine(f"{PROJECT}:{service}", [Path(str(path)) for path in found], folder)
    stack("up", "--detach", "--no-build", "--wait", "ottava", "prometheus", "alertmanager")
    seconds_until(lambda: bool(asked("query", query='up{job="ottava"} == 1')), WARM_S)
    return stack


@pytest.fixture(scope="module")
def load(watched: Stack) -> Load:
    """Comparisons, and the profile loadtest at all rates for both variants."""
    start_s = time.time()
    for _ in range(3):
        ask_to_compare()
        time.sleep(SCRAPE_S)
    watched(
        *("run", "--rm", "loadtest", "bench", "--url", "http://ottava:8000", "--variants", "w8a8,fp16"),
        *("--rates", RATES, "--seconds", "15", "--rounds", "1", "--input-len", "32", "--output-len", "16"),
        *("--json", RESULT),
    )
    for _ in range(2):
        ask_to_compare()
        time.sleep(SCRAPE_S)
    volume = f"{PROJECT}_results:/results:ro"
    found = docker("run", "--rm", "--network", "none", "--volume", volume, "--entrypoint", "cat", CPU_IMAGE, RESULT)
    return Load(json.loads(found)["points"], start_s, time.time())


def test_its_series_are_in_prometheus(watched: Stack, told: Told) -> None:
    series = '(sum(ottava_speedup_ratio_count{measure="e2e"}) or vector(0))'
    before = asked("query", query=series)[0]["value"][1]
    ask_to_compare()
    took_s = seconds_until(lambda: bool(asked("query", query=f"{series} > {before}")), 60.0)
    told(f"a comparison in Prometheus after {took_s:.0f} s")
    rules = json.loads(get("/api/v1/rules", PROMETHEUS)[1])["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}


def test_the_load_test_answers_all_at_every_rate(load: Load, told: Told) -> None:
    assert len(load.points) == 2 * len(RATES.split(","))
    for point in load.points:
        assert point["failed"] == 0
        assert point["completed"] > 0
        own = point["ottava"]
        told(
            f"{point['request_rate']:g}/s {point['model_id']}: {point['completed']} answered, p50/p99 TTFT "
            f"{point['median_ttft_ms']:.0f}/{point['p99_ttft_ms']:.0f} ms, TPOT {point['median_tpot_ms']:.1f}/"
            f"{point['p99_tpot_ms']:.1f} ms{'' if own['valid'] else ', generator late'}"
        )


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.where)
def test_every_query_of_the_dashboard_has_data(load: Load, query: Query) -> None:
    expr = query.filled(rate_interval="1m", range="10m")
    found = asked("query_range", query=expr, start=load.start_s, end=load.end_s, step=5)
    assert any(math.isfinite(float(value)) for series in found for _, value in series["values"]), expr


def test_the_dashboard_is_drawn(load: Load, tmp_path: Path) -> None:
    out = Path(os.environ.get("PICTURE", tmp_path / "dashboard.png"))
    times = ("--start", f"{load.start_s:.0f}", "--end", f"{load.end_s:.0f}", "--rate-interval", "60s")
    output_of([sys.executable, str(GRAFANA / "picture.py"), "--prometheus", PROMETHEUS, *times, "--out", str(out)])
    assert out.stat().st_size > 50_000


@pytest.mark.usefixtures("watched")
def test_the_client_of_openai_is_served() -> None:
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        variants = {model.id.rpartition(":")[2] for model in client.models.list()}
        assert {"w8a8", "fp16"} <= variants
        asking: Any = {"role": "user", "content": "What is the capital of France? One word."}
        answer = client.chat.completions.create(model="w8a8", messages=[asking], max_tokens=16, temperature=0)
        assert "Paris" in (answer.choices[0].message.content or "")
        asking = {"model": "fp16", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        parts = client.completions.create(**asking, stream=True)
        assert "Paris" in "".join(part.choices[0].text for part in parts if part.choices)


def test_guidellm_is_served(watched: Stack, tmp_path: Path, told: Told) -> None:
    if shutil.which("guidellm") is None:
        pytest.skip("guidellm is missing in PATH")
    container = watched("ps", "--quiet", "ottava").strip()
    first = ["find", "/var/cache/ottava", "-name", "tokenizer.json", "-exec", "dirname", "{}", ";", "-quit"]
    folder = docker("exec", container, *first).strip()
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        docker("cp", f"{container}:{folder}/{name}", str(tokenizer))
    out = tmp_path / "guidellm.json"
    done = subprocess.run(
        [
            *("guidellm", "run", "--backend", f"kind=openai_http,target={URL},model=w8a8"),
            *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_duration,seconds=20"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
            *("--tokenizer", f"kind=hf_auto,model={tokenizer}", "--output", f"kind=json,path={out}"),
            "--disable-progress",
        ],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [run] = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    totals = run["metrics"]["request_totals"]
    told(f"guidellm: {totals}")
    assert totals["errored"] == 0
    assert totals["successful"] > 0


def test_an_alert_reaches_alertmanager(watched: Stack, told: Told) -> None:
    """The engine gets SIGKILL; the server comes back, the alert fires in Prometheus and is told on."""
    assert asked("query", query="ottava_engine_restarts_total"), "there is a value from which it can rise"
    docker("exec", watched("ps", "--quiet", "ottava").strip(), "python", "-c", ENGINE)

    def is_told() -> bool:
        alerts = json.loads(get("/api/v2/alerts", ALERTMANAGER)[1] or b"[]")
        return any(alert["labels"]["alertname"] == "OttavaEngineRestarted" for alert in alerts)

    seconds_until(lambda: get("/ready")[0] != 200, 30.0)
    ready_s = seconds_until(lambda: get("/ready")[0] == 200, WARM_S)
    told_s = seconds_until(is_told, FIRES_WITHIN_S)
    told(f"engine killed: ready again in {ready_s:.0f} s, OttavaEngineRestarted in Alertmanager {told_s:.0f} s later")
