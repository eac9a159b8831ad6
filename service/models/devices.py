"""Chooses the device and the float type of a model."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from service.errors import InvalidSettings
from service.models.config import ModelConfig


def pick_device(name: str) -> torch.device:
    """The device to serve on; "auto" is CUDA if available.

    Raises:
        InvalidSettings: CUDA is requested but not available, or it would be used and Triton is not installed.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise InvalidSettings("device = 'cuda': no CUDA GPU is visible here; use device auto or cpu")
    if name == "cuda" and find_spec("triton") is None:
        raise InvalidSettings(
            "device = 'cuda': Triton, which compiles the kernels, is not installed; install it, or use device cpu"
        )
    return torch.device(name)


def pick_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The float type to serve in.

    "auto" is the model's own on a GPU; on a CPU it is bfloat16 if the CPU has bf16 instructions, else float32.
    """
    if name != "auto":
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return config.dtype
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
