"""The assertions of the kernel tests. Each bound follows from the roundings a contract allows, none from trial."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quantized import TINY, Quantized

FLOAT32_SLACK = 2.0**-19
"""Relative to the largest value of a row: float32 sums and products of any order."""


def floats_of(y: Tensor | Quantized) -> Tensor:
    """The result of an op that was to write floats."""
    assert isinstance(y, Tensor)
    return y


def codes_of(y: Tensor | Quantized) -> Quantized:
    """The result of an op that was to write codes."""
    assert isinstance(y, Quantized)
    return y


def check_float(got: Tensor | Quantized, want: Tensor, dtype: torch.dtype, rounded: Tensor | None = None) -> None:
    """got is want (float64) rounded once to dtype; `rounded` adds a half ulp of what an op rounds inside."""
    got = floats_of(got)
    assert got.dtype == dtype
    assert got.shape == want.shape
    half_ulp = torch.finfo(dtype).eps / 2
    bound = half_ulp * want.abs() + FLOAT32_SLACK * want.abs().amax(-1, keepdim=True) + torch.finfo(dtype).tiny / 512
    if rounded is not None:
        bound = bound + half_ulp * rounded
    error = (got.double() - want).abs()
    # Written so that a NaN in got fails.
    assert bool((error <= bound).all()), f"worst {(error / bound).nan_to_num(1e9).max().item():.3g} times the bound"


def check_codes(got: Tensor | Quantized, want: Tensor, static: Tensor | None = None) -> None:
    """got holds want (float64): its scale to float32 rounding, each code the nearest, either one only at a tie."""
    codes, scale = codes_of(got)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.shape == want.shape
    if static is not None:
        assert torch.equal(scale, static)
    else:
        absmax = want.abs().amax(-1) if scale.numel() > 1 or len(want) == 1 else want.abs().amax().reshape(1)
        exact = torch.where(absmax < TINY, 1.0, absmax / 127)
        assert scale.shape == exact.shape
        assert bool(((scale.double() - exact).abs() <= FLOAT32_SLACK * exact).all()), "scale"
    ratio = (want / scale.double().reshape(-1, 1)).clamp(-127 if static is None else -128, 127)
    distance = (codes.double() - ratio).abs().max().item()
    assert distance <= 0.5 + 1e-3, f"a code is {distance:.4f} from its value"
