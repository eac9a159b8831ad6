"""Other processes of this machine, seen from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

STOP_S = 15.0


def is_running(pid: int) -> bool:
    """Whether there is such a process; False of one that has ended and is not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    """The processes that a process has started. Raises OSError if there is no such process."""
    folders = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for folder in folders for word in (folder / "children").read_text(encoding="ascii").split()]


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs. Raises OSError if one of them has ended."""
    found = children(pid)
    return found + [each for child in found for each in descendants(child)]


def cpu_s(pid: int) -> float:
    """Processor time of all its threads so far. Raises OSError if there is no such process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory. Raises OSError if there is no such process, StopIteration if it has ended."""
    return _memory_mb(pid, "VmRSS")


def anonymous_mb(pid: int) -> float:
    """Resident memory without that of files, which the kernel takes and gives back as it likes. Raises as rss_mb."""
    return _memory_mb(pid, "RssAnon")


def _memory_mb(pid: int, field: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def free_port() -> int:
    """A TCP port on loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def served(
    words: Sequence[str], ready_url: str, log: Path, start_s: float, environment: Mapping[str, str] | None = None
) -> Iterator[float]:
    """Start a server and wait until this URL answers 200: the seconds that took. It is ended in any case.

    log: file for what it writes.   environment: variables in addition to those of this process.

    Raises:
        RuntimeError: it ended before, or is not ready within start_s.
    """
    begun_s = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, env=os.environ | (environment or {}), stdout=out, stderr=out, start_new_session=True
        )
    try:
        while not _is_ready(ready_url):
            if process.poll() is not None or time.monotonic() - begun_s > start_s:
                raise RuntimeError(f"{words[0]} does not serve: {log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.2)
        yield time.monotonic() - begun_s
    finally:
        _stop(process)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and all that it has started."""
    for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
