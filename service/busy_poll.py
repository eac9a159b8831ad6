"""Busy polling: a process that has just worked asks whether there is more to do, instead of sleeping until it is woken.

To wake a thread takes the system 50 us and more, and a core that has slept has lost what its caches held. A request
wakes the web, the engine and the web again; each rank of a model would wait for the next step too. Only where cores are
left over: a process that asks takes one for itself.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

DEFAULT_S = 0.02
"""How long after its last work a process asks, where nothing else is set: longer than most steps, and than a client
takes that sends its next request on the answer to the last."""

CORES_OF_EACH = 3
"""Cores that there must be for each process that asks."""

CGROUP = Path("/sys/fs/cgroup")


def polling_s(wanted_ms: float | None, *, is_gpu: bool, num_ranks: int) -> float:
    """How long the processes of a server ask.

    Args:
        wanted_ms: the setting `busy_poll_ms`; None: `DEFAULT_S` on a GPU if there are cores enough, else not at all.
        is_gpu: whether the model runs on one; on a CPU its steps need all cores.
        num_ranks: of the model, each of which is a process, beside that of the web.
    """
    if wanted_ms is not None:
        return wanted_ms / 1e3
    return DEFAULT_S if is_gpu and usable_cores() >= CORES_OF_EACH * (num_ranks + 1) else 0.0


def usable_cores(cgroup: Path = CGROUP) -> float:
    """Cores that this process may use: those that it may run on, or fewer by its container's quota (of cgroup v2)."""
    is_linux = hasattr(os, "sched_getaffinity")
    cores = float(len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1)
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
        # "max" is no number.
        cores = min(cores, int(quota) / int(period))
    return cores


class BusyPoll:
    """How the engines of a process ask, one at a time and while all of them rest: whoever works needs the interpreter.

    Args:
        take: takes in what has come, without waiting.
        has_work: whether any engine has something to do.
        seconds: how long to ask.
    """

    def __init__(self, take: Callable[[], object], has_work: Callable[[], bool], seconds: float) -> None:
        self._take = take
        self._has_work = has_work
        self._seconds = seconds
        self._asking = threading.Lock()

    def ask(self) -> None:
        """Ask until any engine has work, or for as long as is allowed. Returns at once while another thread asks."""
        if not self._seconds or not self._asking.acquire(blocking=False):
            return
        try:
            stop_s = time.monotonic() + self._seconds
            while not self._has_work() and time.monotonic() < stop_s:
                self._take()
        finally:
            self._asking.release()


class PollingSelector(selectors.DefaultSelector):
    """A selector that asks for `busy_poll_s` seconds after its last event, and then sleeps."""

    busy_poll_s = 0.0
    _stop_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See `selectors.BaseSelector.select`."""
        if self.busy_poll_s and (timeout is None or timeout > 0):
            begun_s = now_s = time.monotonic()
            stop_s = self._stop_s if timeout is None else min(self._stop_s, begun_s + timeout)
            while now_s < stop_s:
                if events := super().select(0):
                    self._stop_s = now_s + self.busy_poll_s
                    return events
                now_s = time.monotonic()
            if timeout is not None:
                timeout = max(0.0, begun_s + timeout - now_s)
        events = super().select(timeout)
        if events and self.busy_poll_s:
            self._stop_s = time.monotonic() + self.busy_poll_s
        return events


class PollingEventLoop(asyncio.SelectorEventLoop):
    """An event loop that can poll. busy_poll_s: how long after its last event; 0 at first."""

    def __init__(self) -> None:
        self._polling = PollingSelector()
        super().__init__(self._polling)

    @property
    def busy_poll_s(self) -> float:
        return self._polling.busy_poll_s

    @busy_poll_s.setter
    def busy_poll_s(self, seconds: float) -> None:
        self._polling.busy_poll_s = seconds
