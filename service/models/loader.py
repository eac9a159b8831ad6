"""From a model folder, or from nothing but its shapes, to a decoder."""

from __future__ import annotations

from pathlib import Path

import torch

from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError, UnlikeLinears
from quant.scheme import KVStorage
from service.errors import ModelNotFound, UnsafeCheckpoint
from service.models.config import ModelConfig
from service.models.decoder import Decoder


def load_decoder(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int | None = None,
    kv: KVStorage | None = None,
) -> Decoder:
    """Read a float or int8 model folder.

    Args:
        folder: config.json and safetensors.
        dtype: of everything float; None for the model's own.
        max_model_len: positions to serve; None for the model's own, at most 8192.
        kv: what keys and values are stored in; None for what the folder says.

    Raises:
        ModelNotFound: no such folder.
        UnsupportedModel: see `ModelConfig.of`.
        UnsafeCheckpoint: the weights are pickled.
        CheckpointError: a tensor is missing, corrupt, of another shape, or quantized in a way that is not served.
    """
    refuse_unsafe(folder)
    config = ModelConfig.load(folder, max_model_len)
    return decoder_of(config, Checkpoint.open(folder, dtype or config.dtype, device), kv)


def decoder_of(config: ModelConfig, checkpoint: Checkpoint, kv: KVStorage | None = None) -> Decoder:
    """The decoder of an open checkpoint.

    Args:
        kv: what keys and values are stored in; None for what the checkpoint says.

    Raises:
        CheckpointError: see `load_decoder`; also Linears that are computed as one, but quantized in different ways.
    """
    try:
        with torch.inference_mode():
            return Decoder(config, checkpoint, kv or checkpoint.kv)
    except UnlikeLinears as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error


def refuse_unsafe(folder: Path) -> None:
    """Raise unless the folder exists and holds safetensors."""
    if not folder.is_dir():
        raise ModelNotFound(f"{folder} is neither a folder nor the id of a model that can be fetched")
    has_safetensors = any(folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled and not has_safetensors:
        raise UnsafeCheckpoint(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when read; convert them to safetensors"
        )
