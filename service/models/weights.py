"""The source of a decoder's tensors, and its norms."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

import kernels
from kernels import Quantized, ToInt8
from quant.linear import FloatLinear, Int8Linear
from quant.part import WHOLE, Part
from service.models.config import ModelConfig

Linear = FloatLinear | Int8Linear


class Weights(Protocol):
    """A checkpoint, or random numbers of the same shapes. Shapes are of the whole, of which a part is returned."""

    def tensor(self, name: str, shape: tuple[int, ...], part: Part = WHOLE) -> Tensor: ...

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        has_bias: bool,
        *,
        is_transposed: bool = False,
        part: Part = WHOLE,
    ) -> Linear: ...

    def differs(self, name: str, other: str) -> bool:
        """Whether a tensor of that name is stored, and is not equal to the other one."""
        ...


class Norm:
    """Residual add and RMSNorm, or LayerNorm if there is a bias; outputs the input format of the next Linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, quantize: ToInt8 | None) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self.quantize = quantize

    @classmethod
    def load(cls, config: ModelConfig, weights: Weights, name: str, quantize: ToInt8 | None = None) -> Norm:
        """Load a norm over the hidden states by name."""
        bias = weights.tensor(f"{name}.bias", (config.hidden_size,)) if config.layout.norm == "layer" else None
        return cls(norm_weight(config, weights, name, config.hidden_size), bias, config.norm_eps, quantize)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor | Quantized, Tensor]:
        if self.bias is None:
            return kernels.rms_norm(x, self.weight, self.eps, residual, self.quantize)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, residual, self.quantize)


def norm_weight(config: ModelConfig, weights: Weights, name: str, width: int) -> Tensor:
    """A norm's weight [width] plus the family's offset, then in float32, as bfloat16 would round it away."""
    weight, offset = weights.tensor(f"{name}.weight", (width,)), config.layout.norm_offset
    return weight.float() + offset if offset else weight
