"""docker/compose.cluster.yaml for real: two replicas in a container are asked, and stopped under load.

Run by `make test-deploy` where DEVICES names `cluster`. It takes the port of the service, so it comes before that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.engine import (
    CLUSTER_FILE,
    CLUSTER_HOST_FILE,
    CLUSTER_IMAGE,
    COLD_S,
    KNOWS_START_INTERVAL,
    PROJECT,
    URL,
    WARM_S,
    Stack,
    Told,
    build,
    docker,
    get,
    has_bridge,
    seconds_until,
)
from tests.deploy.load import stopped_under_load

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("cluster" not in os.environ.get("DEVICES", "cpu").split(","), reason="DEVICES has no cluster"),
]


@pytest.fixture(scope="module")
def cluster(api: tuple[int, ...], compose: list[str]) -> Iterator[Stack]:
    """The cluster under a project name of its own, with nothing of an earlier run."""
    if api < KNOWS_START_INTERVAL:
        pytest.skip("the engine is older than 25")
    build("cpu", CLUSTER_IMAGE, knows_start_interval=True, extras="otel cluster")
    files = [CLUSTER_FILE] if has_bridge() else [CLUSTER_FILE, CLUSTER_HOST_FILE]
    made = Stack(compose, files, {"COMPOSE_PROFILES": "cluster", "DEPLOY_REPLICAS": "2"}, f"{PROJECT}-cluster")
    made("down", "--volumes", "--timeout", "5")
    yield made
    made("down", "--volumes", "--timeout", "5")


@pytest.fixture(scope="module")
def ready_s(cluster: Stack) -> float:
    """Starts two replicas with empty volumes. Seconds until both were ready."""
    cluster("up", "--detach", "--no-build")
    return seconds_until(lambda: num_ready() == 2, COLD_S)


def num_ready() -> int:
    body = get("/ready")[1]
    states = json.loads(body).get("replicas", {}) if body.startswith(b"{") else {}
    return sum(bool(state.get("ready")) for state in states.values())


def test_two_replicas_are_ready(cluster: Stack, ready_s: float, told: Told) -> None:
    told(f"two replicas ready after the first start in {ready_s:.0f} s")
    container = cluster("ps", "--quiet").strip()
    health = ["inspect", "--format", "{{.State.Health.Status}}", container]
    seconds_until(lambda: docker(*health).strip() == "healthy", 60.0)


@pytest.mark.usefixtures("ready_s")
def test_one_scrape_has_both() -> None:
    families = {family.name: family for family in text_string_to_metric_families(get("/metrics")[1].decode())}
    assert [sample.value for sample in families["ottava_cluster_replica_up"].samples] == [1.0, 1.0]


@pytest.mark.usefixtures("ready_s")
def test_a_stop_under_load_loses_no_accepted_request(cluster: Stack, told: Told) -> None:
    outcomes, stopped_s = stopped_under_load(URL, lambda: cluster.start("stop"), after_s=15.0)
    told(f"stopped in {stopped_s:.1f} s under load: {dict(outcomes)}")
    container = cluster("ps", "--all", "--quiet").strip()
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container).strip() == "0"
    assert outcomes["done"] >= 8
    assert not [outcome for outcome in outcomes if outcome.startswith("lost")]


@pytest.mark.usefixtures("ready_s")
def test_a_second_start_finds_the_prepared_model(cluster: Stack, told: Told) -> None:
    cluster("stop")
    cluster("up", "--detach", "--no-build")
    warm_s = seconds_until(lambda: num_ready() == 2, WARM_S)
    told(f"two replicas ready after the second start in {warm_s:.0f} s")
