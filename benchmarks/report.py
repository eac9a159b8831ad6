"""What every result carries: the machine, the versions, the commit and the command that gave it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from service.host import machine

RESULTS = Path(__file__).parent / "results"
LEFT_OUT = {"--out", "--commit", "--logs"}


def birth_certificate(commit: str | None = None) -> dict[str, Any]:
    """Device, versions, commit, command and date of a run. commit: given where the tree carries no git history."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = ["python", *_as_module(sys.argv)]
    found = machine.birth_certificate(device, command) | {"device": device_name()}
    return found | {"commit": commit or _commit()}


def device_name() -> str:
    """The GPU's name, or what the kernel calls the processor, with its number of cores in use."""
    if torch.cuda.is_available():
        return machine.device_name(torch.device("cuda"))
    return f"{machine.device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 by nearest rank."""
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, q * len(ordered) // 100)] for q in (20, 50, 80)}


def write(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write one run as JSON and name the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def _as_module(argv: list[str]) -> list[str]:
    """The command as a reader would repeat it: without where the result went and which commit it was told."""
    kept = [word for before, word in zip(["", *argv], argv, strict=False) if {before, word}.isdisjoint(LEFT_OUT)]
    path = Path(argv[0])
    name = path.parent.name if path.stem == "__main__" else path.stem
    return ["-m", f"benchmarks.{name}", *kept[1:]]


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
