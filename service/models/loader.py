"""From a model folder, or from nothing but its shapes, to a decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kernels import CODE_MAX
from quant.checkpoint import Checkpoint, CheckpointError
from quant.linear import FloatLinear, Int8Linear
from quant.scheme import KVStorage, Scheme
from service.errors import InvalidSettings, ModelNotFound, UnsafeCheckpoint
from service.models.decoder import Decoder
from service.models.families import ModelConfig, linear_names


class RandomWeights:
    """Weights of a model's shapes without its values: speed does not depend on them as long as they are random.

    Args:
        scheme: which Linears are int8, and how.
        int8_names: the Linears a scheme quantizes.
        dtype: of everything float.
        seed: of the numbers.
    """

    def __init__(
        self, scheme: Scheme, int8_names: list[str], dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.scheme = scheme
        self.dtype = dtype
        self.device = device
        self._int8_names = frozenset(int8_names if scheme.is_int8 else ())
        self._generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm's weight, the only one of one dimension, about 1; anything else about 0, spread 1 / sqrt(columns)."""
        noise = torch.randn(shape, dtype=self.dtype, device=self.device, generator=self._generator)
        return 1 + 0.1 * noise if name.endswith(".weight") and len(shape) == 1 else noise.mul_(shape[-1] ** -0.5)

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        has_bias: bool,
        is_transposed: bool = False,  # noqa: ARG002 (random numbers are stored in no order)
    ) -> FloatLinear | Int8Linear:
        bias = self.tensor(name + ".bias", (out_features,)) if has_bias else None
        activation = self.scheme.activation
        if name not in self._int8_names or activation == "float":
            return FloatLinear(self.tensor(name + ".weight", (out_features, in_features)), bias)
        codes = torch.randint(
            -CODE_MAX, CODE_MAX + 1, (out_features, in_features), device=self.device, generator=self._generator
        )
        # Uniform codes have the standard deviation 127 / sqrt(3): this scale gives real weights 1 / sqrt(K) of it.
        spread = 3**0.5 / CODE_MAX * in_features**-0.5
        scale = torch.full(self._scale_shape(out_features, in_features), spread, device=self.device)
        input_scale = torch.full((1,), 4.0 / CODE_MAX, device=self.device) if activation == "static" else None
        outliers = self.scheme.outliers
        return Int8Linear(codes.to(torch.int8), scale, bias, activation, input_scale, self.dtype, outliers=outliers)

    def _scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        group_size = self.scheme.fitted([in_features]).group_size
        if group_size is not None:
            return out_features, in_features // group_size
        return (1,) if self.scheme.weight == "tensor" else (out_features,)


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
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error


def random_decoder(
    config: ModelConfig, scheme: Scheme, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Decoder:
    """A decoder of a model's shapes with random weights."""
    with torch.inference_mode():
        return Decoder(config, RandomWeights(scheme, linear_names(config), dtype, device, seed), scheme.kv)


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


def pick_device(name: str) -> torch.device:
    """The device to serve on: "auto" is CUDA where there is one.

    Raises:
        InvalidSettings: CUDA is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidSettings("device = 'cuda': no CUDA GPU is visible here; use device auto or cpu")
    return torch.device(name)


def pick_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The float type to serve in.

    "auto": the model's own on a GPU; on a CPU bfloat16 where it has bf16 instructions, else float32.
    """
    if name != "auto":
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return config.dtype
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
