"""The engine, the images and the composed services, made once for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.deploy.engine import (
    COLD_S,
    COMPOSE_FILE,
    CPU_IMAGE,
    HOST_FILE,
    KNOWS_START_INTERVAL,
    OLD_FILE,
    STAND_INS_FILE,
    Stack,
    Told,
    api_version,
    build,
    compose_binary,
    get,
    has_bridge,
    has_stand_ins,
    seconds_until,
)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Prints a figure past pytest's capture."""

    def tell(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {line}")

    return tell


@pytest.fixture(scope="session")
def api() -> tuple[int, ...]:
    found = api_version()
    if found is None:
        pytest.skip("no Docker engine answers: start one, or name it in DOCKER_HOST")
    return found


@pytest.fixture(scope="session")
def compose() -> list[str]:
    found = compose_binary()
    if found is None:
        pytest.skip("Docker Compose is missing: install its plugin, or docker-compose into PATH")
    return found


@pytest.fixture(scope="session")
def cpu_image(api: tuple[int, ...]) -> str:
    build("cpu", CPU_IMAGE, knows_start_interval=api >= KNOWS_START_INTERVAL)
    return CPU_IMAGE


@pytest.fixture(scope="session")
def stack(compose: list[str], cpu_image: str, api: tuple[int, ...]) -> Iterator[Stack]:
    """Compose under a project name of its own, with nothing of an earlier run."""
    files = [COMPOSE_FILE]
    if not has_bridge():
        files.append(HOST_FILE)
    if has_stand_ins():
        files.append(STAND_INS_FILE)
    if api < KNOWS_START_INTERVAL:
        files.append(OLD_FILE)
    # With drafts, so that their panels have data.
    made = Stack(compose, files, {"COMPOSE_PROFILES": "cpu,alerts", "OTTAVA_SPECULATE": "ngram"})
    down = ("--profile", "*", "down", "--volumes", "--timeout", "5")
    made(*down)
    yield made
    made(*down)


@pytest.fixture(scope="session")
def cold_s(stack: Stack) -> float:
    """Starts ottava with empty volumes. Seconds until it was ready."""
    stack("up", "--detach", "--no-build", "ottava")
    return seconds_until(lambda: get("/ready")[0] == 200, COLD_S)
