"""Random weights of a model's shapes, for measuring speed."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import CODE_MAX
from quant.linear import FloatLinear, InputCodes, Int8Linear
from quant.part import WHOLE, Part, taken
from quant.scheme import Scheme
from service.models.config import ModelConfig, down_names, linear_names
from service.models.decoder import Decoder
from service.models.sharding import ALONE, Ranks


class RandomWeights:
    """Random weights of a model's shapes; speed does not depend on the values as long as they are random.

    Args:
        scheme: the quantization of the Linears.
        config: names them.
        dtype: of all float tensors.
        seed: of the random numbers.
    """

    def __init__(
        self, scheme: Scheme, config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.scheme = scheme
        self.dtype = dtype
        self.device = device
        self._int8_names = frozenset(linear_names(config) if scheme.is_int8 else ())
        self._down_names = down_names(config)
        self._generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, name: str, shape: tuple[int, ...], part: Part = WHOLE) -> Tensor:
        """Norm weights, the only ones of one dimension, around 1; all others around 0, with std 1 / sqrt(columns)."""
        noise = torch.randn(shape, dtype=self.dtype, device=self.device, generator=self._generator)
        # Every rank draws the numbers of the whole, so that the parts are of one model.
        noise = taken(noise, part)
        return 1 + 0.1 * noise if name.endswith(".weight") and len(shape) == 1 else noise.mul_(shape[-1] ** -0.5)

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        has_bias: bool,
        *,
        is_transposed: bool = False,  # noqa: ARG002 (random numbers have no layout)
        part: Part = WHOLE,
    ) -> FloatLinear | Int8Linear:
        bias = self.tensor(name + ".bias", (out_features,), Part(part.rows)) if has_bias else None
        bias = bias if part.adds else None
        activation = (self.scheme.of_down() if name in self._down_names else self.scheme).activation
        if name not in self._int8_names or activation == "float":
            return FloatLinear(self.tensor(name + ".weight", (out_features, in_features), part), bias)
        codes = torch.randint(
            -CODE_MAX, CODE_MAX + 1, (out_features, in_features), device=self.device, generator=self._generator
        )
        # Uniform codes have the standard deviation 127 / sqrt(3); with this scale, real weights have 1 / sqrt(K).
        spread = 3**0.5 / CODE_MAX * in_features**-0.5
        codes = taken(codes.to(torch.int8), part)
        scale = torch.full(self._scale_shape(*codes.shape), spread, device=self.device)
        input_scale = torch.full((1,), 4.0 / CODE_MAX, device=self.device) if activation == "static" else None
        input_codes = InputCodes(activation, input_scale, outliers=self.scheme.outliers)
        return Int8Linear(codes, scale, input_codes=input_codes, out_dtype=self.dtype, bias=bias)

    def differs(self, name: str, other: str) -> bool:  # noqa: ARG002 (nothing is stored)
        """See `Weights`."""
        return False

    def _scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        group_size = self.scheme.fitted([in_features]).group_size
        if group_size is not None:
            return out_features, in_features // group_size
        return (1,) if self.scheme.weight == "tensor" else (out_features,)


def random_decoder(
    config: ModelConfig,
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    *,
    ranks: Ranks = ALONE,
) -> Decoder:
    """A decoder with a model's shapes and random weights."""
    weights = RandomWeights(scheme, config, dtype, device, seed)
    with torch.inference_mode():
        return Decoder(config, weights, scheme.kv, scheme.head, ranks=ranks)
