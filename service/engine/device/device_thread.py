"""Lets one call at a time onto a device, on one thread unless it only launches work."""

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
    """Runs calls one at a time: of `run` in order of arrival on its own thread, of `launch` on the caller's.

    So only one engine's step uses the device at a time, and the computing thread is always the same: OpenMP keeps a
    pool of workers for each thread that has ever computed, and once the pools together outnumber the cores it stops
    spinning between parallel regions, which doubles the time of a decode step on a CPU.
    """

    def __init__(self) -> None:
        self._is_free = threading.Lock()
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=_turn, args=(self._work, self._is_free), name=DEVICE_THREAD, daemon=True).start()
        # The thread refers to the queue but not to this object, so collecting this object ends the thread.
        weakref.finalize(self, self._work.put, None)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Queue a call, and wait for its result or exception. Must not be called on the device thread itself."""
        done: Future[R] = Future()
        self._work.put((done, lambda: function(*args, **kwargs)))
        return done.result()

    def launch(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that only launches work on a GPU. Like `run`, but on the calling thread: none has to wake up."""
        with self._is_free:
            return function(*args, **kwargs)


def _turn(work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], is_free: threading.Lock) -> None:
    while (item := work.get()) is not None:
        done, call = item
        try:
            with is_free:
                result = call()
            done.set_result(result)
            del result
        except BaseException as error:  # noqa: BLE001 (passed to the caller)
            done.set_exception(error)
        # The call may refer to the model, so it must not stay alive while the thread sleeps.
        del item, done, call
