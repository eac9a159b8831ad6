"""Process-wide helpers: threads, garbage collection and exit."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from malloc.h."""

MMAP_BYTES = 32 * 2**20
"""From here on a block is mapped by itself and returned when it is freed: the largest value that glibc takes."""

KEPT_BYTES = 256 * 2**20
"""Most free memory at the end of an arena that is kept for the next step."""

P = ParamSpec("P")
R = TypeVar("R")


def start_thread(name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
    """Run a function on a new daemon thread. Returns a future of its result or exception.

    Unlike an executor's thread, this one ends with its work and leaves no pool of OpenMP threads; see `DeviceThread`.
    """
    done: Future[R] = Future()
    # The future can no longer be cancelled: the work continues even if the waiting caller is.
    done.set_running_or_notify_cancel()

    def work() -> None:
        try:
            done.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 (passed to the caller)
            done.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return done


def settle() -> None:
    """Collect garbage once, and exclude all live objects from later collections.

    A full collection visits every object. With torch and transformers imported that takes a quarter of a second, during
    which no thread of this process runs, and 64 streams trigger one about every five seconds. Loaded objects stay alive
    anyway. A second call, as after a reload, visits everything once more and frees what has been released since.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> bool:
    """Tell glibc to keep memory that is freed, up to `KEPT_BYTES` an arena. Returns whether it does; others have none.

    A step on a CPU allocates what the step before has freed. By default glibc returns megabytes of it in between, and
    the system clears each page anew when it is touched again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs; False of one that has ended and is not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end_process(code: int) -> NoReturn:
    """Flush logs and output, and exit at once, whatever other threads are doing."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
