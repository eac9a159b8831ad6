"""docker/ by reading it: versions, rights, health checks, settings and variables. `make test-deploy` runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from quant import __version__
from service.host.channel.client import STOP_S
from service.settings import Settings
from service.web.draining import FAREWELL_S
from tests.support.pages import ROOT, text_of

DOCKER = ROOT / "docker"
DOCKERFILE = text_of(DOCKER / "Dockerfile")
COMPOSE = yaml.safe_load(text_of(DOCKER / "compose.yaml"))
KUBERNETES = {part["kind"]: part for part in yaml.safe_load_all(text_of(DOCKER / "kubernetes" / "ottava.yaml"))}
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = ("ottava", "ottava-gpu")
JOBS = ("loadtest",)
"""Services that end by themselves: nobody waits for their health."""

VARIABLE = re.compile(r"\$\{(\w+)")
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w-]+)?")
NOT_PASSED_ON = {"config", "api_keys", "admin_api_keys", "host", "port", "cache_dir", "in_process"}
"""Settings that the image or the compose file decides, and keys, which come as a file."""


def default_of(value: str) -> str:
    """A value with every ${NAME:-default} replaced by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def seconds(value: str) -> int:
    assert value.endswith("s")
    return int(value[:-1])


def dockerfile_instructions() -> Iterator[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    for line in joined.splitlines():
        word, _, rest = line.partition(" ")
        if word:
            yield word, rest


INSTRUCTIONS = list(dockerfile_instructions())


def the_last(word: str) -> str:
    return [rest for name, rest in INSTRUCTIONS if name == word][-1]


def test_every_image_is_pinned() -> None:
    images = [service["image"] for service in SERVICES.values()]
    [container] = KUBERNETES["Deployment"]["spec"]["template"]["spec"]["containers"]
    base = next(rest for word, rest in INSTRUCTIONS if word == "ARG" and rest.startswith("BASE="))
    for image in (*images, container["image"], base.removeprefix("BASE=")):
        assert PINNED.fullmatch(image), image
    own = {image for image in (*images, container["image"]) if image.startswith("ottava:")}
    assert own == {f"ottava:{__version__}-cpu", f"ottava:{__version__}-cuda"}
    assert ("ARG", f"VERSION={__version__}") in INSTRUCTIONS
    stages = [rest.partition(" AS ") for word, rest in INSTRUCTIONS if word == "FROM"]
    names = {name for _, _, name in stages}
    for source, _, _ in stages:
        by_device = {source.replace("${DEVICE}", device) for device in ("cpu", "cuda")}
        assert source == "${BASE}" or by_device <= names, source


def test_no_own_image_is_looked_for_in_a_registry() -> None:
    for service in SERVICES.values():
        assert service["image"].startswith("ottava:") == ("build" in service), service["image"]


def test_packages_come_from_the_constraints() -> None:
    for word, rest in INSTRUCTIONS:
        for install in re.findall(r"pip install [^&;]*", rest) if word == "RUN" else ():
            assert "--constraint constraints.txt" in install or "--no-deps" in install, install


def test_the_demo_model_is_the_one_that_is_served() -> None:
    wanted = re.search(r'REQUIREMENT = "(.*)"', text_of(ROOT / "service" / "store" / "demo.py"))
    assert wanted is not None
    assert re.fullmatch(rf"{re.escape(wanted[1])} --hash=sha256:[0-9a-f]{{64}}\n", text_of(DOCKER / "demo.txt"))


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    ignored = text_of(DOCKER / "Dockerfile.dockerignore").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for word, rest in INSTRUCTIONS
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert ignored[0] == "*"
    assert allowed == copied
    assert all((ROOT / path).exists() for path in allowed)


def test_the_image_runs_without_root_and_stops_by_signal() -> None:
    assert the_last("USER") == "10001:0"
    assert json.loads(the_last("ENTRYPOINT")) == ["ottava"]
    assert json.loads(the_last("CMD")) == ["serve"]
    assert the_last("STOPSIGNAL") == "SIGTERM"


def test_image_and_compose_ask_for_readiness_in_the_same_way() -> None:
    flags, _, command = the_last("HEALTHCHECK").partition(" CMD ")
    for name in SERVERS:
        check = dict(SERVICES[name]["healthcheck"])
        assert check.pop("test") == ["CMD", *json.loads(command)]
        assert {f"--{key.replace('_', '-')}={value}" for key, value in check.items()} == set(flags.split())
    assert "/ready" in command


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert "privileged" not in service
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"]
    assert limits["pids"]
    for port in service.get("ports", ()):
        assert default_of(port).startswith("127.0.0.1:"), port


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_a_profile_and_a_health_check(name: str) -> None:
    assert SERVICES[name]["profiles"]
    check = SERVICES[name]["healthcheck"]
    if name in JOBS:
        assert check == {"disable": True}
    else:
        assert (check["start_period"], check["start_interval"]) == ("600s", "2s")


def test_what_another_service_waits_for_has_a_health_check() -> None:
    for service in SERVICES.values():
        for name, wait in service.get("depends_on", {}).items():
            assert wait["condition"] == "service_healthy"
            assert name not in JOBS
            # Without this a service of another profile would be an error.
            assert set(service["profiles"]) <= set(SERVICES[name]["profiles"]) or wait["required"] is False


def test_volumes_are_named_and_files_of_the_repository_are_read_only() -> None:
    named = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source, _, mode = default_of(volume).partition(":")
            if source.startswith("."):
                assert mode.endswith(":ro"), volume
            else:
                named.add(source)
    assert named == set(COMPOSE["volumes"])


def test_secrets_are_files() -> None:
    assert {secret for service in SERVICES.values() for secret in service.get("secrets", ())} == set(COMPOSE["secrets"])
    for secret in COMPOSE["secrets"].values():
        assert set(secret) == {"file"}


def test_stopping_leaves_time_to_drain() -> None:
    drain_s = Settings.model_fields["drain_timeout_s"].default + FAREWELL_S + STOP_S
    for name in SERVERS:
        assert seconds(default_of(SERVICES[name]["stop_grace_period"])) > drain_s
    pod = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    [waiting] = re.findall(r"sleep\((\d+)\)", container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] > drain_s + int(waiting)


def test_every_setting_can_be_set() -> None:
    settings = {f"OTTAVA_{name.upper()}" for name in Settings.model_fields if name not in NOT_PASSED_ON}
    for name in SERVERS:
        passed = [re.split(r"[=$]", entry)[0] for entry in SERVICES[name]["environment"]]
        assert {entry for entry in passed if entry.startswith("OTTAVA_")} == settings
        assert len(set(passed)) == len(passed)


def test_only_settings_begin_with_our_prefix() -> None:
    known = {f"OTTAVA_{name.upper()}" for name in Settings.model_fields}
    [container] = KUBERNETES["Deployment"]["spec"]["template"]["spec"]["containers"]
    texts = [DOCKERFILE, text_of(DOCKER / ".env"), *(entry["name"] for entry in container["env"])]
    assert {name for text in texts for name in re.findall(r"\bOTTAVA_\w+", text)} - {"OTTAVA_NAME"} <= known


def test_every_variable_is_told() -> None:
    arguments = [argument for name in SERVERS for argument in SERVICES[name]["build"]["args"].items()]
    builds = {name for name, value in arguments if value is None}
    used = set(VARIABLE.findall(text_of(DOCKER / "compose.yaml"))) | builds | {"COMPOSE_PROFILES"}
    in_page = set(re.findall(r"^\| `([A-Z_]+)` \|", text_of(ROOT / "docs" / "deploy.md"), re.MULTILINE))
    in_file = set(re.findall(r"^#?([A-Z_]+)=", text_of(DOCKER / ".env"), re.MULTILINE))
    assert used == in_page
    assert {name for name in used if not name.startswith("OTTAVA_")} <= in_file
    for name in in_file:
        assert name in used or name.removeprefix("OTTAVA_").lower() in Settings.model_fields, name


def test_the_default_profile_is_the_cpu() -> None:
    assert re.findall(r"^COMPOSE_PROFILES=(.*)$", text_of(DOCKER / ".env"), re.MULTILINE) == ["cpu"]


def test_the_pod_has_three_probes_apart() -> None:
    [container] = KUBERNETES["Deployment"]["spec"]["template"]["spec"]["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


def test_the_pod_has_no_more_rights_than_it_needs() -> None:
    pod = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == the_last("USER")
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # A service named ottava would set OTTAVA_PORT otherwise.
    assert pod["enableServiceLinks"] is False
    assert KUBERNETES["PersistentVolumeClaim"]["metadata"]["name"] in json.dumps(pod["volumes"])
    assert KUBERNETES["Service"]["spec"]["selector"] == KUBERNETES["Deployment"]["spec"]["selector"]["matchLabels"]
