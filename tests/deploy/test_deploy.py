"""docker/ for real: the image is built, the compose file brought up, asked, and stopped under load.

Run with `make test-deploy`. DOCKER_HOST names the engine, DOCKER its client; BASE, PIP_INDEX_URL and TORCH_INDEX are
build arguments, as in docker/.env, and BUILD_NETWORK the network of builds; DEVICES=cpu,cuda,cluster builds all images;
ADVISORIES names a checkout of pypa/advisory-database where pip-audit cannot ask PyPI. Figures are printed as they come.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.deploy.engine import (
    COLD_S,
    COMPOSE_FILE,
    CPU_IMAGE,
    KNOWS_START_INTERVAL,
    PORT,
    PROJECT,
    ROOT,
    URL,
    WARM_S,
    Stack,
    Told,
    ask_to_compare,
    build,
    docker,
    docker_binary,
    get,
    inspected,
    listeners,
    output_of,
    seconds_until,
)
from tests.deploy.load import stopped_under_load
from tests.support.audit import audit, packages_of

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(3600)]

LIMITS_BYTES = {"cpu": 1_500_000_000, "cuda": 8_000_000_000, "cluster": 2_000_000_000}
STOP_S = 45.0
RIGHTS = ["--read-only", "--tmpfs", "/tmp:size=256m,mode=1777", "--cap-drop", "ALL"]
RIGHTS += ["--security-opt", "no-new-privileges:true"]


@pytest.fixture(scope="module", params=["cpu", "cuda", "cluster"])
def image(request: pytest.FixtureRequest, api: tuple[int, ...]) -> str:
    """The image of a device, built."""
    device: str = request.param
    if device not in os.environ.get("DEVICES", "cpu").split(","):
        pytest.skip(f"{device} is not in DEVICES")
    tag = CPU_IMAGE.replace("-cpu", f"-{device}")
    build(
        "cpu" if device == "cluster" else device,
        tag,
        knows_start_interval=api >= KNOWS_START_INTERVAL,
        extras="otel cluster" if device == "cluster" else "otel",
    )
    return tag


@pytest.mark.parametrize("profiles", ["cpu", "gpu", "cpu,alerts", "gpu,alerts", "cpu,loadtest", "gpu,loadtest"])
def test_the_compose_file_is_valid(compose: list[str], profiles: str) -> None:
    command = [*compose, "--file", str(COMPOSE_FILE), "config", "--quiet"]
    output_of(command, env={**os.environ, "COMPOSE_PROFILES": profiles})


def test_the_cpu_is_what_comes_up_without_flags(compose: list[str]) -> None:
    def services(*flags: str) -> set[str]:
        clean = {name: value for name, value in os.environ.items() if name != "COMPOSE_PROFILES"}
        return set(
            output_of(
                [*compose, "--file", "docker/compose.yaml", *flags, "config", "--services"], cwd=ROOT, env=clean
            ).split()
        )

    assert services() == {"ottava", "prometheus", "grafana"}
    assert services("--profile", "gpu") == {"ottava-gpu", "prometheus", "grafana"}


def test_keys_reach_the_server_as_a_file_or_not_at_all(compose: list[str], tmp_path: Path) -> None:
    def environment(**variables: str) -> dict[str, str | None]:
        shown = output_of(
            [*compose, "--file", str(COMPOSE_FILE), "config", "--format", "json"], env={**os.environ, **variables}
        )
        found = json.loads(shown)["services"]["ottava"]["environment"]
        assert isinstance(found, dict)
        return found

    assert environment().get("OTTAVA_API_KEYS_FILE") is None
    assert environment(DEPLOY_API_KEYS=str(tmp_path / "keys"))["OTTAVA_API_KEYS_FILE"] == "/run/secrets/api_keys"


def test_the_image_is_below_its_limit(image: str, told: Told) -> None:
    size = inspected(image)["Size"]
    told(f"{image}: {size / 1e9:.2f} GB")
    assert size < LIMITS_BYTES[image.rpartition("-")[2]]


def test_the_image_holds_no_tests_and_no_more_tools_than_it_needs(image: str) -> None:
    def run(*command: str) -> str:
        return docker("run", "--rm", "--network", "none", "--entrypoint", "sh", image, "-c", " ".join(command))

    assert run("command -v gcc || true").strip() == ("/usr/bin/gcc" if image.endswith("cuda") else "")
    packages = "/opt/ottava/lib/python3*/site-packages"
    assert (
        run(f"ls -d {packages}/pytest {packages}/tests {packages}/benchmarks {packages}/mypy 2>/dev/null || true") == ""
    )
    assert run("find / -xdev -perm -4000 -newer /opt/ottava 2>/dev/null || true") == ""
    configuration = inspected(image)["Config"]
    assert configuration["User"] == "10001:0"
    assert configuration["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_a_first_start_is_ready(cold_s: float, told: Told) -> None:
    told(f"ready after the first start in {cold_s:.0f} s: model converted and quantized")


@pytest.mark.usefixtures("cold_s")
def test_the_container_becomes_healthy(stack: Stack) -> None:
    def health() -> str:
        return docker(
            "inspect", "--format", "{{.State.Health.Status}}", stack("ps", "--quiet", "ottava").strip()
        ).strip()

    seconds_until(lambda: health() == "healthy", 60.0)


@pytest.mark.usefixtures("cold_s")
def test_a_request_is_compared(told: Told) -> None:
    answer = ask_to_compare()
    told(f"/generate: {answer['text'][:20]!r}, e2e speed-up {answer['speedup']['e2e']}")
    assert "Paris" in answer["text"]
    assert answer["agreement"]["common_prefix_tokens"] > 0


@pytest.mark.usefixtures("cold_s")
def test_nothing_listens_beyond_loopback() -> None:
    assert listeners(PORT)
    assert listeners(PORT) <= {"0100007F", "00000000000000000000000001000000"}


@pytest.mark.usefixtures("cold_s")
def test_another_host_name_is_refused(told: Told) -> None:
    """A page of another site cannot reach the server by a name of its own that leads to 127.0.0.1."""
    sent = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--header", "Host: example.org"]
    assert output_of([*sent, f"{URL}/info"]) == "421"


@pytest.mark.usefixtures("cold_s")
def test_the_container_cannot_write_elsewhere_and_has_no_capability(stack: Stack) -> None:
    code = "import pathlib; print(pathlib.Path('/proc/1/status').read_text()); pathlib.Path('/opt/x').write_text('')"
    command = [docker_binary(), "exec", stack("ps", "--quiet", "ottava").strip(), "python", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "Read-only file system" in done.stderr
    assert "CapEff:\t0000000000000000" in done.stdout
    assert "NoNewPrivs:\t1" in done.stdout


@pytest.mark.usefixtures("cold_s")
def test_a_stop_under_load_loses_no_accepted_request(stack: Stack, told: Told) -> None:
    """Streams that began are finished, later ones are told to come back, and the exit code is 0."""
    outcomes, stopped_s = stopped_under_load(URL, lambda: stack.start("stop", "ottava"), after_s=10.0)
    told(f"stopped in {stopped_s:.1f} s under load: {dict(outcomes)}")
    container = stack("ps", "--all", "--quiet", "ottava").strip()
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container).strip() == "0"
    assert outcomes["done"] >= 8
    assert not [outcome for outcome in outcomes if outcome.startswith("lost")]


@pytest.mark.usefixtures("cold_s")
def test_a_second_start_is_ready_in_seconds(stack: Stack, told: Told) -> None:
    stack("stop", "ottava")
    stack("up", "--detach", "--no-build", "ottava")
    warm_s = seconds_until(lambda: get("/ready")[0] == 200, WARM_S)
    told(f"ready after the second start in {warm_s:.0f} s")


@pytest.mark.usefixtures("cold_s")
def test_a_signal_while_it_starts_ends_it_at_once(stack: Stack, told: Told) -> None:
    stack("restart", "ottava")
    started = time.monotonic()
    stack("stop", "ottava")
    stopped_s = time.monotonic() - started
    told(f"stopped in {stopped_s:.1f} s while it started")
    assert stopped_s < STOP_S / 2


@pytest.mark.usefixtures("cold_s")
def test_any_user_id_serves_without_a_network(stack: Stack, told: Told) -> None:
    """A first start: no network, no right to write but to an empty cache, a user id that no file knows."""
    stack("stop", "ottava")
    volume = f"{PROJECT}_other:/var/cache/ottava"
    name = f"{PROJECT}-random-uid"
    settings = [part for variable in os.environ if variable.startswith("OTTAVA_") for part in ("--env", variable)]
    docker(
        *("run", "--detach", "--init", "--name", name, "--network", "none", "--user", "1234567:0", *RIGHTS),
        *("--volume", volume, *settings, "--env", "OTTAVA_ALLOW_ANONYMOUS=true", CPU_IMAGE),
    )
    try:
        health = ["inspect", "--format", "{{.State.Health.Status}}", name]
        took_s = seconds_until(lambda: docker(*health).strip() == "healthy", COLD_S)
        assert docker("exec", name, "id", "-u").strip() == "1234567"
        told(f"healthy in {took_s:.0f} s as user 1234567 with no network")
    finally:
        docker("rm", "--force", name)
        docker("volume", "rm", f"{PROJECT}_other")


def test_a_server_without_keys_does_not_start_beyond_loopback(cpu_image: str) -> None:
    done = subprocess.run(
        [docker_binary(), "run", "--rm", "--network", "none", *RIGHTS, cpu_image],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "there are no API keys" in " ".join(done.stderr.split())


def test_no_package_of_the_image_has_a_known_vulnerability(cpu_image: str, told: Told) -> None:
    """By pip-audit, or by the checkout of advisories that ADVISORIES names; fails where neither gives an answer."""
    listed = docker("run", "--rm", "--network", "none", "--entrypoint", "pip", cpu_image, "list", "--format", "freeze")
    folder = os.environ.get("ADVISORIES")
    done = audit(packages_of(listed), Path(folder) if folder else None)
    told(str(done))
    assert not done.found
