"""transformers with compressed-tensors: how others compute a checkpoint."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.modules import evaluated

pytest.importorskip("compressed_tensors")


def load(folder: Path) -> PreTrainedModel:
    """The oracle in float32: in 16 bits it rounds x / scale and the dequantized weight to 8 bits of mantissa."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return evaluated(model)


def limit_codes_to_127(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle with codes in -127..127: its dynamic scale, absmax / (range / 2), is then absmax / 127 as ours is."""
    ends = torch.tensor(-127.0), torch.tensor(127.0)
    for name in ("utils.helpers", "lifecycle.forward"):
        module = importlib.import_module(f"compressed_tensors.quantization.{name}")
        monkeypatch.setattr(module, "calculate_range", lambda _args, _device: ends)
