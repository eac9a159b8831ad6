"""Rounds weights to int8 codes and scales, and finds the scale of a calibrated activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels import CODE_MAX
from quant.errors import Unquantizable
from quant.scheme import Scheme

Strategy = Literal["tensor", "channel", "group"]


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """How the scales of a weight are found and stored.

    strategy: "channel" (a scale per row), "group" (a scale per row and group_size columns) or "tensor" (one).
    dtype: what scales are stored in.
    group_size: with "group" alone; it has to divide K.
    clip: share of the largest magnitude that becomes code 127; what is beyond it saturates.
    """

    strategy: Strategy
    dtype: torch.dtype
    group_size: int | None = None
    clip: float = 1.0

    @classmethod
    def of(cls, scheme: Scheme, dtype: torch.dtype, clip: float = 1.0) -> ScaleRule:
        """The rule of an int8 scheme."""
        assert scheme.weight != "float"
        return cls(scheme.weight, dtype, scheme.group_size, clip)


def quantize_weight(weight: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to int8.

    scale = round(clip absmax / 127 to the rule's dtype)        codes = clamp(rint(weight / scale), -127, 127)

    The scale is rounded first: codes made with the unrounded scale would represent other values when it is stored.

    Args:
        weight: [N, K] float.
        rule: how scales are found.

    Returns:
        codes [N, K] int8 in -127..127 and scale [N, 1] (channel), [N, K // group_size] (group) or [1] (tensor) in
        the rule's dtype, positive. The scale of zeros only is 1.

    Raises:
        Unquantizable: the weight is NaN or infinite, or its scale overflows the rule's dtype.
        ValueError: K is no multiple of group_size.

    Source: SmoothQuant (arXiv 2211.10438), equation 1; ZeroQuant (arXiv 2206.01861), section 4.1, for groups.
    """
    weight = weight.float()
    scale = weight_scale(weight, rule)
    codes = (weight / per_element(scale, weight.shape[1])).round_().clamp_(-CODE_MAX, CODE_MAX).to(torch.int8)
    return codes, scale


def weight_scale(weight: Tensor, rule: ScaleRule) -> Tensor:
    """The scale that `quantize_weight` rounds a weight with; raises as it does."""
    if rule.strategy == "tensor":
        return static_scale(rule.clip * weight.abs().amax().reshape(1), rule.dtype)
    num_rows, width = weight.shape
    size = rule.group_size if rule.strategy == "group" and rule.group_size is not None else width
    if width % size:
        raise ValueError(f"groups of {size} inputs do not divide its width {width}; see Scheme.fitted")
    return static_scale(rule.clip * weight.abs().view(num_rows, width // size, size).amax(2), rule.dtype)


def per_element(scale: Tensor, width: int) -> Tensor:
    """A weight's scale in float32, in a shape that multiplies codes [N, width]: [1], [N, 1] or [N, width]."""
    if scale.ndim == 1 or scale.shape[1] == 1:
        return scale.float()
    return scale.float().repeat_interleave(width // scale.shape[1], dim=1)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The values of codes [N, K] with a scale of `quantize_weight`, float32."""
    return codes.float() * per_element(scale, codes.shape[1])


def static_scale(absmax: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The scale absmax / 127 in scale_dtype, such that absmax is at most half a code beyond 127.

    If absmax is 0 the scale is 1. If rounding down would lose more than that (float16's subnormals), the next larger
    value is taken.

    Raises:
        Unquantizable: absmax is NaN or infinite, or absmax / 127 overflows scale_dtype.
    """
    scale = (absmax.float() / CODE_MAX).to(scale_dtype)
    if not bool(scale.isfinite().all()):
        raise Unquantizable(f"its largest magnitude is {absmax.max().item():g}: no finite scale in {scale_dtype}")
    saturates = absmax.float() > (CODE_MAX + 0.5) * scale.float()
    # Positive floats are ordered like their bits, so adding 1 gives the next larger value in any float type.
    bits = scale.view(torch.int16 if scale.element_size() == 2 else torch.int32)
    scale = torch.where(saturates, (bits + 1).view(scale_dtype), scale)
    return torch.where(absmax == 0, torch.ones_like(scale), scale)
