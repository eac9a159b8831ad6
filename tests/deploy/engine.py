"""The Docker engine and Compose of this machine, and what a test asks of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from quant import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE_FILE = ROOT / "docker" / "compose.yaml"
CLUSTER_FILE = ROOT / "docker" / "compose.cluster.yaml"
HOST_FILE = Path(__file__).with_name("compose.host.yaml")
STAND_INS_FILE = Path(__file__).with_name("compose.stand_ins.yaml")
CLUSTER_HOST_FILE = Path(__file__).with_name("compose.cluster.host.yaml")
OLD_FILE = Path(__file__).with_name("compose.old.yaml")
BUILD_ARGUMENTS = ("BASE", "PIP_INDEX_URL", "TORCH_INDEX")
"""Taken from the environment where they are set, as docker/.env does."""

KNOWS_START_INTERVAL = (1, 44)
"""API of Docker Engine 25."""

PROJECT = "ottava-test"
PORT = 8000  # where docker/prometheus looks for it
URL = f"http://127.0.0.1:{PORT}"
PROMETHEUS, ALERTMANAGER = "http://127.0.0.1:9090", "http://127.0.0.1:9093"
CPU_IMAGE, CLUSTER_IMAGE = f"ottava:{__version__}-cpu", f"ottava:{__version__}-cluster"
Told: TypeAlias = Callable[[str], None]
"""Prints a figure."""

COLD_S, WARM_S = 1800.0, 300.0
"""Most time to be ready with empty and with full caches."""


def output_of(command: Sequence[str], **options: Any) -> str:
    """The standard output of a command; a failure shows what it said."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, check=False, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout


def docker(*arguments: str, **options: Any) -> str:
    return output_of([docker_binary(), *arguments], **options)


def docker_binary() -> str:
    """$DOCKER, or the one in PATH."""
    return os.environ.get("DOCKER", "docker")


def compose_binary() -> list[str] | None:
    """`docker compose`, else `docker-compose` in PATH; None if there is neither."""
    plugin = [docker_binary(), "compose"]
    if (
        shutil.which(plugin[0])
        and subprocess.run([*plugin, "version"], check=False, capture_output=True).returncode == 0
    ):
        return plugin
    found = shutil.which("docker-compose")
    return [found] if found else None


def api_version() -> tuple[int, ...] | None:
    """The API of the engine that DOCKER_HOST or the default socket leads to; None if none answers."""
    if shutil.which(docker_binary()) is None:
        return None
    asked = [docker_binary(), "version", "--format", "{{.Server.APIVersion}}"]
    done = subprocess.run(asked, check=False, capture_output=True, text=True)
    return tuple(map(int, done.stdout.strip().split("."))) if done.returncode == 0 else None


def has_bridge() -> bool:
    return "bridge" in docker("network", "ls", "--format", "{{.Driver}}").split()


def has_stand_ins() -> bool:
    """Whether programs of this machine stand for the images of Prometheus and Alertmanager: with STAND_INS=1."""
    return os.environ.get("STAND_INS") == "1"


def build(device: str, tag: str, *, knows_start_interval: bool, extras: str = "otel") -> None:
    """Build docker/Dockerfile; without --start-interval for an engine that does not know it."""
    network = os.environ.get("BUILD_NETWORK") or ("default" if has_bridge() else "host")
    text = DOCKERFILE.read_text(encoding="utf-8")
    arguments = [part for name in BUILD_ARGUMENTS if name in os.environ for part in ("--build-arg", name)]
    # Beside the original, so that its .dockerignore is found.
    copy = DOCKERFILE.with_name(".Dockerfile.test")
    ignored = copy.with_name(f"{copy.name}.dockerignore")
    try:
        copy.write_text(text if knows_start_interval else text.replace(" --start-interval=2s", ""), encoding="utf-8")
        shutil.copy(f"{DOCKERFILE}.dockerignore", ignored)
        docker(
            *("build", "--file", str(copy), "--tag", tag, "--network", network),
            *("--build-arg", f"DEVICE={device}", "--build-arg", f"EXTRAS={extras}", *arguments, str(ROOT)),
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
        )
    finally:
        copy.unlink(missing_ok=True)
        ignored.unlink(missing_ok=True)


def inspected(image: str) -> dict[str, Any]:
    [found] = json.loads(docker("image", "inspect", image))
    assert isinstance(found, dict)
    return found


def build_of_this_machine(tag: str, programs: Sequence[Path], folder: str) -> None:
    """An image of programs of this machine, the first of which is what it runs; `folder` takes its data.

    What Debian's packages keep in share/prometheus beside the programs comes with them.
    """
    base = os.environ.get("BASE", "python:3.11.16-slim-bookworm")
    with tempfile.TemporaryDirectory() as context:
        for program in programs:
            shutil.copy(program, context)
        (Path(context) / "share").mkdir()
        shared = programs[0].parents[1] / "share" / "prometheus" / "alertmanager"
        if shared.is_dir():
            shutil.copytree(shared, Path(context) / "share" / "alertmanager")
        names = " ".join(program.name for program in programs)
        lines = f"FROM {base}\nCOPY {names} /usr/bin/\nCOPY share /usr/share/prometheus\n"
        lines += f'RUN install -d -m 1777 {folder}\nUSER 65534\nENTRYPOINT ["{programs[0].name}"]\n'
        (Path(context) / "Dockerfile").write_text(lines, encoding="utf-8")
        docker("build", "--quiet", "--network", "host", "--tag", tag, context)


class Stack:
    """The services of compose files under a project name of their own.

    Args:
        command: Compose.
        files: compose files.
        variables: of the shell that runs Compose.
        project: its name.
    """

    def __init__(
        self, command: Sequence[str], files: Sequence[Path], variables: Mapping[str, str], project: str = PROJECT
    ) -> None:
        named = [part for file in files for part in ("--file", str(file))]
        self._command = [*command, "--project-name", project, *named]
        self._variables = {**os.environ, **variables}

    def __call__(self, *arguments: str) -> str:
        return output_of([*self._command, *arguments], env=self._variables)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Run a command beside the test."""
        return subprocess.Popen([*self._command, *arguments], env=self._variables, stderr=subprocess.DEVNULL)


def ask_to_compare() -> dict[str, Any]:
    """The answer of /generate to a request that both variants run."""
    body = json.dumps({"prompt": "The capital of France is", "max_tokens": 24, "compare": True})
    sent = ["curl", "--silent", "--show-error", "--fail", f"{URL}/generate"]
    answer = json.loads(output_of([*sent, "--header", "content-type: application/json", "--data", body]))
    assert isinstance(answer, dict)
    return answer


def get(path: str, url: str = URL) -> tuple[int, bytes]:
    """Status and body; status 0 where nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}{path}", timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def seconds_until(what: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until it is true."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s:g} s"
        time.sleep(0.25)
    return time.monotonic() - started


def listeners(port: int) -> set[str]:
    """The addresses that listen on a TCP port of this machine, as /proc/net writes them: 0100007F is 127.0.0.1."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        lines = Path(table).read_text(encoding="ascii").splitlines()[1:] if Path(table).exists() else []
        for _, local, _, state, *_ in map(str.split, lines):
            address, _, hexadecimal = local.partition(":")
            if state == "0A" and int(hexadecimal, 16) == port:
                found.add(address)
    return found
