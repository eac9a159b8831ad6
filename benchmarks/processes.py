"""Other processes of this machine, seen from outside."""

from __future__ import annotations

import os
import socket
from pathlib import Path


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
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def free_port() -> int:
    """A TCP port on loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
