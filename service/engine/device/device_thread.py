"""The one thread on which all models of a device run."""

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
    """Runs calls one at a time, in order of arrival, on its own thread.

    So only one engine's step uses the device at a time, and the computing thread is always the same: OpenMP keeps a
    pool of workers for each thread that has ever computed, and once the pools together outnumber the cores it stops
    spinning between parallel regions, which doubles the time of a decode step on a CPU.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=_turn, args=(self._work,), name=DEVICE_THREAD, daemon=True).start()
        # The thread refers to the queue but not to this object, so collecting this object ends the thread.
        weakref.finalize(self, self._work.put, None)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Queue a call, and wait for its result or exception. Must not be called on the device thread itself."""
        done: Future[R] = Future()
        self._work.put((done, lambda: function(*args, **kwargs)))
        return done.result()


def _turn(work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (item := work.get()) is not None:
        done, call = item
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 (passed to the caller)
            done.set_exception(error)
        # The call may refer to the model, so it must not stay alive while the thread sleeps.
        del item, done, call
