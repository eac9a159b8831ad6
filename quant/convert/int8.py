"""One Linear in int8: its codes and scales as stored, and its product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.linear import InputCodes, Int8Linear
from quant.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Int8Tensors:
    """codes [N, K] int8, scale (see `quantize_weight`), input_scale [1] for static activations; scales as stored."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def stored(self, name: str, is_transposed: bool) -> dict[str, Tensor]:
        """The tensors by checkpoint name. is_transposed: codes are stored [K, N], as the family stores its weights."""
        tensors = {f"{name}.weight": self.codes.T if is_transposed else self.codes, f"{name}.weight_scale": self.scale}
        return tensors if self.input_scale is None else tensors | {f"{name}.input_scale": self.input_scale}

    def linear(self, scheme: Scheme, bias: Tensor | None) -> Int8Linear:
        """The Linear that is served, but with float32 outputs."""
        assert scheme.activation != "float"
        scale = self.scale.float()
        scale = scale if scheme.weight == "group" else scale.reshape(-1)
        input_scale = None if self.input_scale is None else self.input_scale.float()
        input_codes = InputCodes(scheme.activation, input_scale, outliers=scheme.outliers)
        return Int8Linear(self.codes, scale, input_codes=input_codes, out_dtype=torch.float32, bias=bias)


class Int8Module(nn.Module):
    """An `Int8Linear` that replaces a module's Linear: x [..., K] -> [..., N], in x's dtype."""

    def __init__(self, linear: Int8Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, -2)).view(*x.shape[:-1], -1).to(x.dtype)
