"""Work on a thread of its own, which neither the event loop nor the end of the process waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def start_thread(name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
    """What the function returns or raises, once it has.

    Unlike an executor's, the thread ends with its work: no pool of OpenMP threads stays behind, see `Turnstile`.
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
