"""What is needed to repeat a measurement: machine, versions, command and date."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from kernels.cpu.library import WHY_NOT
from kernels.cpu.product import HAS_INT8_DOT
from quant import __version__


def versions() -> dict[str, str]:
    """The versions of ottava, its main libraries and Python, by name; without Triton's where it is not installed."""
    return {
        "ottava": __version__,
        "torch": str(torch.__version__),
        **({"triton": metadata.version("triton")} if find_spec("triton") is not None else {}),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's name from /proc/cpuinfo."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def birth_certificate(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Date, device, versions, threads and command of a run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        **versions(),
        "threads": torch.get_num_threads(),
        **(_processor() if device.type == "cpu" else {}),
        "command": shlex.join(command),
    }


def _processor() -> dict[str, str]:
    """What decides the speed of a CPU beside its name: its vector instructions, and what the ops are written in."""
    return {
        "instructions": torch.backends.cpu.get_cpu_capability() + (" VNNI" if HAS_INT8_DOT else ""),
        "cpu_ops": "C" if WHY_NOT is None else "torch",
    }


def quiet_libraries() -> None:
    """Silence transformers' warnings and progress bars, since ottava reports progress itself."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
