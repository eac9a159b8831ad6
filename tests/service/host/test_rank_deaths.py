"""The end of either of two ranks. Apart from the other tests, since a process joins one group at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest

from service.engine.api import SamplingParams
from service.errors import EngineFailed
from service.host.ranks import group as ranks_group
from service.host.reloader import open_host
from tests.support.engines import collect
from tests.support.tiny_models import save_tiny_model
from tests.support.two_ranks import SHAPE, settings_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("ranks") / "model", "llama", **SHAPE)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_rank_that_is_killed_is_noticed_and_no_process_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, seen = list[str](), threading.Event()

    def ended(why: str) -> None:
        told.append(why)
        seen.set()

    monkeypatch.setattr(ranks_group, "_end", ended)
    host = open_host(settings_of(folder, 2, variants=["w8a8"]))
    try:
        assert host.group is not None
        (pid,) = host.group.pids
        os.kill(pid, signal.SIGKILL)
        assert seen.wait(20)
        assert told == [f"rank 1 (pid {pid}) ended with code -9"]
        with pytest.raises(EngineFailed):
            asyncio.run(collect(host.engines["w8a8"], [5, 6, 7], SamplingParams(3)))
    finally:
        host.stop()
    assert not exists(pid)


def test_ranks_end_with_the_first(folder: Path) -> None:
    host = open_host(settings_of(folder, 2, variants=["w8a8"]))
    assert host.group is not None
    pids, meeting = host.group.pids, host.group._meeting
    assert all(exists(pid) for pid in pids)
    assert meeting.exists()
    host.stop()
    assert not any(exists(pid) for pid in pids)
    assert not meeting.exists()
