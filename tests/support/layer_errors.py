"""Errors of a tiny model's Linears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from quant.analysis.layer_errors import LinearError, linear_errors
from quant.checkpoint.reader import Checkpoint
from quant.scheme import Scheme
from service.models.config import ModelConfig, smooth_groups
from service.store.calibration import Calibration

WINDOWS = torch.randint(340, (2, 40), generator=torch.Generator().manual_seed(0))

CPU = torch.device("cpu")


SHORT = Calibration(num_windows=2, window_len=32)


def errors(
    source: Path,
    int8: Path,
    scheme: Scheme,
    windows: Tensor = WINDOWS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[LinearError]:
    config = ModelConfig.load(source)
    groups = smooth_groups(config) if scheme.smoothing is not None else []
    stored = Checkpoint.open(int8, torch.float32, CPU)
    return linear_errors(source, stored, groups, windows, on_progress)
