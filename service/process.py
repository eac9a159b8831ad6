"""The process itself: work on threads of its own, garbage collection, and leaving at once."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def start_thread(name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
    """What the function returns or raises, once it has.

    Unlike an executor's, the thread ends with its work: no pool of OpenMP threads stays behind, see `DeviceThread`.
    """
    done: Future[R] = Future()
    # From here on it cannot be cancelled: whoever waits for it may leave, the work goes on.
    done.set_running_or_notify_cancel()

    def work() -> None:
        try:
            done.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 (handed to whoever waits for it)
            done.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return done


def settle() -> None:
    """Collect garbage once, and leave all that is alive now out of later collections.

    A full collection looks at every object. With torch and transformers imported that takes a quarter of a second, in
    which no thread of this process moves, and 64 streams bring one about every five seconds. What has been loaded
    stays anyway. Called again, as after a reload, it looks at everything once more: what was let go since is freed.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def end_process(code: int) -> NoReturn:
    """Exit at once with what was logged written, whatever other threads are at."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
