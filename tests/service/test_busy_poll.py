"""Busy polling: who asks, for how long, and that work is found while asking and asleep alike."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import threading
import time
from pathlib import Path

import pytest
from fastapi import FastAPI

from service import busy_poll
from service.busy_poll import DEFAULT_S, BusyPoll, PollingEventLoop, PollingSelector, polling_s, usable_cores
from service.settings import Settings
from service.web.uvicorn_config import server_config


@pytest.mark.parametrize(
    ("wanted_ms", "is_gpu", "num_ranks", "cores", "seconds"),
    [
        (None, True, 1, 6, DEFAULT_S),
        (None, True, 1, 5.5, 0.0),
        (None, True, 2, 8, 0.0),
        (None, True, 2, 9, DEFAULT_S),
        (None, False, 1, 64, 0.0),
        (0, True, 1, 64, 0.0),
        (5, False, 1, 1, 0.005),
    ],
)
def test_it_is_for_gpus_with_cores_to_spare(
    monkeypatch: pytest.MonkeyPatch,
    wanted_ms: float | None,
    is_gpu: bool,
    num_ranks: int,
    cores: float,
    seconds: float,
) -> None:
    monkeypatch.setattr(busy_poll, "usable_cores", lambda: cores)
    assert polling_s(wanted_ms, is_gpu=is_gpu, num_ranks=num_ranks) == seconds


@pytest.mark.parametrize(
    ("written", "cores"), [("max 100000", None), ("50000 100000", 0.5), ("100000000 100000", None), ("what", None)]
)
def test_cores_are_those_of_the_container(tmp_path: Path, written: str, cores: float | None) -> None:
    own = float(len(os.sched_getaffinity(0)))
    assert usable_cores(tmp_path) == own
    (tmp_path / "cpu.max").write_text(written + "\n")
    assert usable_cores(tmp_path) == (own if cores is None else cores)


def test_asking_ends_with_work_or_with_its_time() -> None:
    taken: list[int] = []
    begun_s = time.monotonic()
    BusyPoll(lambda: taken.append(1), lambda: len(taken) == 3, 5.0).ask()
    assert len(taken) == 3
    assert time.monotonic() - begun_s < 4
    begun_s = time.monotonic()
    BusyPoll(lambda: None, lambda: False, 0.02).ask()
    assert time.monotonic() - begun_s >= 0.02
    BusyPoll(lambda: pytest.fail("nobody is to ask"), lambda: False, 0.0).ask()
    BusyPoll(lambda: pytest.fail("nobody is to ask"), lambda: True, 5.0).ask()


def test_one_thread_asks_at_a_time() -> None:
    let_go = threading.Event()
    asked = BusyPoll(lambda: None, let_go.is_set, 20.0)
    asking = threading.Thread(target=asked.ask)
    asking.start()
    while not asked._asking.locked():
        time.sleep(0.001)
    begun_s = time.monotonic()
    asked.ask()
    assert time.monotonic() - begun_s < 10
    let_go.set()
    asking.join(10)
    assert not asking.is_alive()


class Clock:
    """A clock that each look advances by a millisecond. asked: the timeouts of the waits for events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.asked: list[float | None] = []
        self.events_at: set[int] = set()
        monkeypatch.setattr(time, "monotonic", self.read)
        monkeypatch.setattr(selectors.DefaultSelector, "select", self.select)

    def read(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def select(self, timeout: float | None = None) -> list[object]:
        self.asked.append(timeout)
        return ["an event"] if len(self.asked) in self.events_at else []


def test_a_selector_asks_for_its_time_after_an_event_and_then_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    selector = PollingSelector()
    clock = Clock(monkeypatch)
    selector.busy_poll_s = 0.005
    # Nothing has happened yet, so it sleeps.
    clock.events_at = {1, 4}
    assert selector.select(None)
    assert clock.asked == [None]
    # Then it asks, until there is an event.
    assert selector.select(None)
    assert clock.asked == [None, 0, 0, 0]
    # No event comes: it asks for 5 ms, a millisecond each time, and sleeps for what is left of its timeout.
    clock.asked.clear()
    clock.events_at = set()
    assert selector.select(0.1) == []
    assert set(clock.asked[:-1]) == {0}
    assert 3 <= len(clock.asked[:-1]) <= 5
    slept_s = clock.asked[-1]
    assert slept_s is not None
    assert 0.09 <= slept_s < 0.1
    # From then on it sleeps at once, and never asks beyond a timeout.
    clock.asked.clear()
    selector.select(0.1)
    assert clock.asked == [pytest.approx(0.1, abs=0.002)]
    selector.close()


def test_the_server_has_a_loop_that_can_poll_and_does_not_at_first() -> None:
    factory = server_config(FastAPI(), Settings()).get_loop_factory()
    assert factory is PollingEventLoop
    with asyncio.Runner(loop_factory=factory) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, PollingEventLoop)
        assert loop.busy_poll_s == 0


def test_an_event_loop_answers_and_keeps_its_times_polling_or_not() -> None:
    async def go(seconds: float) -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, PollingEventLoop)
        loop.busy_poll_s = seconds
        assert loop.busy_poll_s == seconds
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            for pause_s in (0.0, 0.01, 0.06):
                timer = threading.Timer(pause_s, theirs.sendall, (b"x",))
                timer.start()
                assert await asyncio.wait_for(loop.sock_recv(ours, 1), 20) == b"x"
                timer.join()
        begun_s = time.monotonic()
        await asyncio.sleep(0.05)
        return time.monotonic() - begun_s

    for seconds in (0.0, 0.03):
        with asyncio.Runner(loop_factory=PollingEventLoop) as runner:
            assert runner.run(go(seconds)) >= 0.049
