"""The manifest and the compose file of a cluster by reading them: arguments, resources, times, rights."""

from __future__ import annotations

import re
from typing import Any

import yaml

from quant import __version__
from service.cluster.options import (
    APP_NAME,
    GATEWAY_APP_NAME,
    ClusterOptions,
    GatewayOptions,
    gateway_settings,
    max_ongoing_requests,
)
from service.settings import Settings, load_settings
from service.web.draining import FAREWELL_S
from tests.support.pages import ROOT, text_of

SERVICE = yaml.safe_load(text_of(ROOT / "docker" / "kubernetes" / "cluster.yaml"))
SERVE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
APPLICATIONS = {app["name"]: app for app in SERVE["applications"]}
COMPOSE = yaml.safe_load(text_of(ROOT / "docker" / "compose.cluster.yaml"))
DEPLOYMENT = text_of(ROOT / "service" / "cluster" / "deployment.py")

OPTIONS = ClusterOptions(**APPLICATIONS[APP_NAME]["args"])
GATEWAYS = GatewayOptions(**APPLICATIONS[GATEWAY_APP_NAME]["args"])


def pod(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["template"]["spec"]
    return found


HEAD, WORKERS = CLUSTER["headGroupSpec"], CLUSTER["workerGroupSpecs"][0]


def test_the_applications_are_those_of_the_command() -> None:
    assert set(APPLICATIONS) == {APP_NAME, GATEWAY_APP_NAME}
    for app in APPLICATIONS.values():
        module, _, name = app["import_path"].partition(":")
        assert module == "service.cluster.deployment"
        assert f"def {name}(" in DEPLOYMENT
        assert app["route_prefix"] is None, "Ray's proxies serve nothing"
    assert SERVE["proxy_location"] == "Disabled"


def test_the_settings_are_valid_and_those_of_the_gateway_agree() -> None:
    settings = OPTIONS.loaded()
    assert gateway_settings(settings) == gateway_settings(load_settings(**GATEWAYS.settings))
    assert settings.api_keys_file is not None
    assert settings.host == "0.0.0.0"
    assert max_ongoing_requests(settings) == 256 + 1024


def test_every_replica_and_every_gateway_finds_its_machine() -> None:
    limits = pod(WORKERS)["containers"][0]["resources"]["limits"]
    assert float(limits["nvidia.com/gpu"]) == OPTIONS.gpus_per_replica
    assert float(limits["cpu"]) >= OPTIONS.cpus_per_replica
    assert (WORKERS["minReplicas"], WORKERS["maxReplicas"]) == (OPTIONS.replicas, OPTIONS.max_replicas)
    assert WORKERS["replicas"] == GATEWAYS.gateways
    assert GATEWAYS.resource is not None
    assert f'\\"{GATEWAYS.resource}\\": 1' in WORKERS["rayStartParams"]["resources"]
    assert HEAD["rayStartParams"]["num-cpus"] == "0"


def test_a_pod_goes_after_its_requests() -> None:
    settings = OPTIONS.loaded()
    grace_s = pod(WORKERS)["terminationGracePeriodSeconds"]
    assert grace_s > settings.drain_timeout_s + FAREWELL_S + 5 + 5


def test_probes_ask_the_gateway_for_traffic_and_ray_for_life() -> None:
    worker = pod(WORKERS)["containers"][0]
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}
    assert {"name": "serve", "containerPort": 8000} in worker["ports"]
    assert '("GET", "/-/healthz")' in text_of(ROOT / "service" / "cluster" / "gateway.py")
    assert "local_raylet_healthz" in " ".join(worker["livenessProbe"]["exec"]["command"])


def test_versions_and_rights() -> None:
    ranged = re.search(r'"ray\[serve\]>=([\d.]+),<([\d.]+)"', text_of(ROOT / "pyproject.toml"))
    assert ranged is not None

    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    low, high = ranged.groups()
    assert numbers(low) <= numbers(CLUSTER["rayVersion"]) < numbers(high)
    assert CLUSTER["authOptions"] == {"mode": "token"}
    for group in (HEAD, WORKERS):
        (container,) = pod(group)["containers"]
        assert container["image"] == f"ottava:{__version__}-cuda"
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod(group)["securityContext"]["runAsNonRoot"] is True
        assert pod(group)["enableServiceLinks"] is False


def test_the_compose_file_runs_the_command_with_time_to_drain() -> None:
    (service,) = COMPOSE["services"].values()
    assert service["command"][0] == "cluster"
    assert service["image"] == f"ottava:{__version__}-cluster"
    assert service["profiles"] == ["cluster"]
    assert int(service["stop_grace_period"].removesuffix("s")) > Settings().drain_timeout_s + FAREWELL_S + 5
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]


def test_the_compose_file_passes_on_what_that_of_one_server_does() -> None:
    def passed_on(service: dict[str, Any]) -> set[str]:
        return {name for name in service["environment"] if name.startswith("OTTAVA_")}

    (cluster,) = COMPOSE["services"].values()
    server = yaml.safe_load(text_of(ROOT / "docker" / "compose.yaml"))["services"]["ottava"]
    assert passed_on(cluster) == passed_on(server)
    assert cluster["secrets"] == server["secrets"]
    assert cluster["volumes"] == server["volumes"]
