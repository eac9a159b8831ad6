"""`ottava cluster` for real: Ray, gateway and CPU replicas of a tiny random model, killed and updated under load.

Run by `make test-deploy` where the extra `cluster` is installed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

if not (find_spec("ray") and find_spec("aiohttp")):
    pytest.skip("ray or aiohttp is missing: pip install 'ottava[cluster]'", allow_module_level=True)

from benchmarks.cluster import (
    LOST,
    OK,
    REFUSED,
    TINY,
    RunningCluster,
    command_of,
    killed,
    make_model,
    quiet_answers,
    running,
    updated,
)

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("cluster") / "model", layers=2, width=128)


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[RunningCluster]:
    with running(model, 2, *TINY) as cluster:
        yield cluster


def get(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_answers_for_both(pair: RunningCluster) -> None:
    status, text = get(f"{pair.url}/ready")
    names = set(pair.members())
    assert status == 200
    assert set(json.loads(text)["replicas"]) == names
    assert len(names) == 2
    info = json.loads(get(f"{pair.url}/info")[1])
    assert set(info["replicas"]) == names
    assert info["variants"]["w8a8"]
    assert get(f"{pair.url}/health")[0] == 200
    assert get(f"{pair.url}/-/healthz") == (200, "success")
    assert get(f"{pair.url}/")[0] == 200
    assert get(f"{pair.url}/v1/models")[0] == 200


def test_errors_are_those_of_a_server(pair: RunningCluster) -> None:
    assert get(f"{pair.url}/generate", {"prompt": "x", "max_tokens": -1})[0] == 400
    assert get(f"{pair.url}/generate", {"prompts": "x"})[0] == 422
    assert get(f"{pair.url}/generate", {"prompt": "x", "variant": "int4"})[0] == 404
    assert get(f"{pair.url}/nowhere")[0] == 404


def test_one_scrape_has_both(pair: RunningCluster) -> None:
    asyncio.run(quiet_answers(pair.url))
    status, text = get(f"{pair.url}/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    tokens = families["ottava_generation_tokens"].samples
    assert {sample.labels["replica"] for sample in tokens} == set(pair.members())
    assert all(sample.value for sample in tokens if sample.name.endswith("_total")), "both have had requests"
    up = families["ottava_cluster_replica_up"].samples
    assert [sample.value for sample in up] == [1.0, 1.0]


def test_a_known_prefix_stays_with_its_replica(pair: RunningCluster) -> None:
    def requests_by_replica() -> dict[str, float]:
        families = {family.name: family for family in text_string_to_metric_families(get(f"{pair.url}/metrics")[1])}
        counted: dict[str, float] = {}
        for sample in families["ottava_requests"].samples:
            if sample.name.endswith("_total"):
                counted[sample.labels["replica"]] = counted.get(sample.labels["replica"], 0) + sample.value
        return counted

    before = requests_by_replica()
    prompt = "a long common beginning " * 20
    for number in range(8):
        assert get(f"{pair.url}/generate", {"prompt": f"{prompt}{number}", "max_tokens": 2})[0] == 200
    after = requests_by_replica()
    assert sorted(after[name] - before[name] for name in after) == [0, 8]


def test_a_killed_replica_costs_only_what_it_had_begun(pair: RunningCluster) -> None:
    found = asyncio.run(killed(pair, streams=6, seconds=6))
    assert found["requests"][LOST] == 0, found
    assert found["requests"][REFUSED] == 0, found
    assert found["requests"][OK] > 20, found
    assert all("send the request again" in said for said in found["said"]), found


def test_an_update_loses_nothing(pair: RunningCluster) -> None:
    found = asyncio.run(updated(pair, streams=4, seconds=6))
    assert sum(found["requests"].values()) == found["requests"][OK] > 0, found


def test_four_replicas_share_the_load(model: Path) -> None:
    with running(model, 4, *TINY) as cluster:
        asyncio.run(quiet_answers(cluster.url))
        found = asyncio.run(killed(cluster, streams=8, seconds=6))
        assert found["requests"][LOST] == found["requests"][REFUSED] == 0, found


def test_what_cannot_be_placed_is_told(model: Path) -> None:
    command = command_of(model, 2, 0, "--cpus-per-replica", "1000")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "lower --cpus-per-replica" in done.stderr
