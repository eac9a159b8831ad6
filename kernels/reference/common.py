"""Rounding to codes, and what all ops of the reference share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.quantized import CODE_MAX, TINY, Outliers, Quantized, ToInt8, require_scale


def quantize_rows(x: Tensor) -> Quantized:
    """Round each row of x to int8 with its own scale.

    scale_t = max_k |x_tk| / 127        codes = rint(x / scale)        x ~ codes * scale

    Args:
        x: [T, K] float, any strides. A row whose absmax is below 2**-100 gets scale 1 and codes 0. A row that holds
            NaN or infinity gets a scale that is not finite, so that rounding hides no fault.

    Returns:
        codes [T, K] int8 in -127..127 (ties to even) and scale [T] float32.

    Source: ZeroQuant (arXiv 2206.01861), token-wise quantization.
    """
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    scale = absmax / CODE_MAX
    # Negated, as the least of rows of which one holds NaN is NaN.
    if absmax.numel() and not absmax.min().item() >= TINY:
        is_zero = absmax < TINY
        x = x.masked_fill(is_zero, 0.0)
        scale.masked_fill_(is_zero, 1.0)
    return Quantized((x / scale).round_().to(torch.int8), scale.squeeze(-1))


def quantize_tensor(x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Quantized:
    """Round all of x to int8 with one scale, given or found.

    scale = max |x| / 127 unless given        codes = clamp(rint(x / scale), -128, 127)
    with a zero point                         codes = clamp(rint(x / scale) + zero_point, -128, 127)

    Args:
        x: [T, K] float, any strides.
        scale: float32 [1], positive: a static scale. None finds the tensor's own, by the rules of `quantize_rows`.
        zero_point: int8 [1], the code of 0, or None; only if a scale is given. Then x ~ (codes - zero_point) * scale,
            and what multiplies the codes has to subtract the zero point.

    Returns:
        codes [T, K] int8 (ties to even), in -127..127 unless a scale is given, and scale [1] float32.

    Raises:
        ValueError: a zero point without a scale.

    Source: SmoothQuant (arXiv 2211.10438), table 2: per-tensor static (O3) and dynamic (O2) activations; the zero
    point: Jacob et al. (arXiv 1712.05877), equation 1.
    """
    require_scale(scale, zero_point)
    x = x.float()
    if scale is None:
        absmax = x.abs().amax().reshape(1)
        scale = (absmax / CODE_MAX).masked_fill_(absmax < TINY, 1.0)
    codes = (x / scale).round_()
    codes = codes if zero_point is None else codes.add_(zero_point)
    return Quantized(codes.clamp_(-128, CODE_MAX).to(torch.int8), scale)


def split_outliers(x: Tensor, threshold: float) -> tuple[Quantized, Outliers]:
    """Round each row of x to int8 without the columns that hold an outlier, and list those columns.

    O = {k : max_t |x_tk| >= threshold}        scale_t = max_{k not in O} |x_tk| / 127        codes = 0 in O

    Args:
        x: [T, K] float, any strides.
        threshold: positive, in x's units. NaN counts as an outlier.

    Returns:
        codes [T, K] int8 and scale [T], by the rules of `quantize_rows`, and O.

    Source: LLM.int8() (arXiv 2208.07339), section 3.2.
    """
    # Written so that NaN counts as one.
    is_outlier = ~(x.abs() < threshold).all(0)
    columns = is_outlier.nonzero().squeeze(-1).to(torch.int32)
    count = torch.tensor([len(columns)], dtype=torch.int32, device=x.device)
    listed = Outliers(F.pad(columns, (0, len(is_outlier) - len(columns))), count)
    return quantize_rows(x.masked_fill(is_outlier, 0.0)), listed


ROWS_AT_ONCE = 128


def row_slices(num_rows: int, at_once: int = ROWS_AT_ONCE) -> Iterator[slice]:
    """Slices of rows. Float32 values of ROWS_AT_ONCE stay in the cache: all rows at once take 3 times as long."""
    for start in range(0, num_rows, at_once):
        yield slice(start, start + at_once)


def joined(parts: list[Tensor | Quantized]) -> Tensor | Quantized:
    """Slices of rows joined into one tensor. A static scale is the same in each."""
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if not quantized:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    scale = quantized[0].scale
    is_static = all(part.scale is scale for part in quantized)
    return Quantized(
        torch.cat([part.codes for part in quantized]),
        scale if is_static else torch.cat([part.scale for part in quantized]),
    )


def store(y: Tensor, dtype: torch.dtype, quantize: ToInt8 | None) -> Tensor | Quantized:
    """A float32 result in `dtype`, or as codes and scale."""
    if quantize is None:
        return y.to(dtype)
    return quantize_rows(y) if quantize.scale is None else quantize_tensor(y, quantize.scale)
