"""What every result carries: the machine, the versions, the commit and the command that gave it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from kernels import __version__

RESULTS = Path(__file__).parent / "results"
LEFT_OUT = {"--out", "--commit"}


def birth_certificate(commit: str | None = None) -> dict[str, Any]:
    """Device, versions, commit, command and date of a run. commit: given where the tree carries no git history."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "ottava": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit or _commit(),
        "command": " ".join(["python", *_as_module(sys.argv)]),
    }


def device_name() -> str:
    """The GPU's name, or what the kernel calls the processor, with its number of cores in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads"


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 by nearest rank."""
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, q * len(ordered) // 100)] for q in (20, 50, 80)}


def write(path: Path, certificate: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write one run as JSON and name the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": certificate, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def _as_module(argv: list[str]) -> list[str]:
    """The command as a reader would repeat it: without where the result went and which commit it was told."""
    kept = [word for before, word in zip(["", *argv], argv, strict=False) if {before, word}.isdisjoint(LEFT_OUT)]
    return ["-m", f"benchmarks.{Path(argv[0]).stem}", *kept[1:]]


def _commit() -> str:
    folder = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"
