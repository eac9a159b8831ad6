"""The one thread on which every model of a device computes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
DEVICE_THREAD = "device"


class DeviceThread:
    """Runs one piece of work at a time, in the order of arrival, on a thread of its own.

    One engine's step has the device to itself. And it is always the same thread that computes: OpenMP keeps a pool of
    workers for each thread that ever did, and once the pools together outnumber the cores it stops spinning between
    parallel regions, which doubles the time of a decode step on a CPU.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=_turn, args=(self._work,), name=DEVICE_THREAD, daemon=True).start()
        # The thread holds the queue, not this object: it ends with its last user.
        weakref.finalize(self, self._work.put, None)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Wait for the turn and the result; what the function raises is raised here. Not from within a turn."""
        done: Future[R] = Future()
        self._work.put((done, lambda: function(*args, **kwargs)))
        return done.result()


def _turn(work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (item := work.get()) is not None:
        done, call = item
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 (handed to whoever waits for it)
            done.set_exception(error)
        # Nothing of this turn may stay alive while the thread sleeps: it may hold the model.
        del item, done, call
