"""Loads a decoder from a model folder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from quant.checkpoint.reader import Checkpoint, some_of
from quant.checkpoint.safetensors_files import largest
from quant.errors import CheckpointError, UnlikeLinears
from quant.scheme import HeadStorage, KVStorage
from service.errors import ModelNotFound, UnsafeCheckpoint
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.sharding import ALONE, Ranks
from service.models.weights import Weights

logger = logging.getLogger(__name__)


def load_decoder(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int | None = None,
    kv: KVStorage | None = None,
) -> Decoder:
    """Read a float or int8 model folder.

    Args:
        folder: contains config.json and safetensors.
        dtype: of all float tensors; None for the model's own.
        max_model_len: positions to serve; None for the model's own, at most 8192.
        kv: storage type of keys and values; None for the checkpoint's own.

    Raises:
        ModelNotFound: the folder does not exist.
        UnsupportedModel: as `ModelConfig.load`.
        UnsafeCheckpoint: the weights are pickled.
        CheckpointError: a tensor is missing, corrupt, of another shape, quantized in an unsupported way, or left over.
    """
    refuse_unsafe(folder)
    config, checkpoint = opened(folder, dtype, device, max_model_len)
    return decoder_of(config, checkpoint, kv)


def opened(
    folder: Path, dtype: torch.dtype | None, device: torch.device, max_model_len: int | None
) -> tuple[ModelConfig, Checkpoint]:
    """A folder's configuration and checkpoint. Arguments and errors as of `load_decoder`.

    The configuration has positions for the checkpoint's sink, beside those that are served.
    """
    config = ModelConfig.load(folder, max_model_len)
    checkpoint = Checkpoint.open(folder, dtype or config.dtype, device)
    num_sinks = len(checkpoint.sink_ids)
    return (ModelConfig.load(folder, max_model_len, num_sinks) if num_sinks else config), checkpoint


def decoder_of(
    config: ModelConfig,
    checkpoint: Checkpoint,
    kv: KVStorage | None = None,
    head: HeadStorage = "float",
    *,
    weights: Weights | None = None,
    ranks: Ranks = ALONE,
) -> Decoder:
    """The decoder of an open checkpoint, or a rank's part of it.

    Args:
        kv: storage type of keys and values; None for the checkpoint's own.
        head: "int8" rounds a float head.
        weights: reads the checkpoint; None for the checkpoint itself.

    Raises:
        CheckpointError: as `load_decoder`, or Linears to be fused are quantized in different ways.
    """
    try:
        with torch.inference_mode():
            decoder = Decoder(
                config, weights or checkpoint, kv or checkpoint.kv, head, ranks=ranks, sink=checkpoint.sink()
            )
    except UnlikeLinears as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error
    _refuse_overflow(decoder, checkpoint)
    idle = checkpoint.refuse_unused()
    if idle:
        logger.info("%s: not used, as they change nothing: %s", checkpoint.folder, some_of(idle))
    return decoder


def _refuse_overflow(decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a scaled row of the embedding is infinite: who sends its token would get no answer."""
    scale, embedding = decoder.embedding_scale, decoder.embedding
    if scale is None or embedding.is_meta:
        return
    most = largest(embedding)
    if most * scale > torch.finfo(embedding.dtype).max:
        name = f"{decoder.config.layout.names.embedding}.weight"
        raise CheckpointError(
            f"{checkpoint.files.path(name)}: {name} reaches {most:g}: times {scale:g}, as the model multiplies it, it "
            f"is infinite in {str(embedding.dtype).removeprefix('torch.')}; download or convert the model again"
        )


def refuse_unsafe(folder: Path) -> None:
    """Raise ModelNotFound if the folder does not exist, UnsafeCheckpoint if it has only pickled weights."""
    if not folder.is_dir():
        raise ModelNotFound(f"{folder} is neither a folder nor the id of a model that can be fetched")
    has_safetensors = any(folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled and not has_safetensors:
        raise UnsafeCheckpoint(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when read; convert them to safetensors"
        )
