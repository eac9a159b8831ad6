"""GPTQ's rounding: the rounding error of each column is compensated in the columns that are rounded after it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import CODE_MAX
from quant.convert.rounding import ScaleRule, per_element, weight_scale
from quant.errors import Unquantizable

DAMPING = 0.01
"""Share of the mean diagonal that is added to it, so that columns with hardly any calibration data take no errors."""

COLUMNS_AT_ONCE = 128
"""Columns whose errors are spread together over all columns after them."""


def round_gptq(weight: Tensor, gram: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to int8 so that its outputs, not its elements, are close to the original.

    Minimizes ||X W^T - X (codes scale)^T||^2 greedily, column by column: with U the upper Cholesky factor of
    (X^T X + damping)^-1, the error e = (w_k - codes_k scale) / U_kk of column k changes each later column j by -e U_kj.

    Args:
        weight: [N, K] float.
        gram: [K, K] float32, X^T X of the Linear's calibration inputs.
        rule: as for `quantize_weight`, which also gives the scale.

    Returns:
        codes [N, K] int8 in -127..127 and scale, as `quantize_weight`.

    Raises:
        ValueError: as `quantize_weight`, or the gram matrix is not [K, K].
        Unquantizable: as `quantize_weight`, or the gram matrix is not finite.

    Source: GPTQ (arXiv 2210.17323), algorithm 1, columns in the order of falling diagonal.
    """
    width = weight.shape[1]
    if gram.shape != (width, width):
        raise ValueError(f"gram {list(gram.shape)} must be [{width}, {width}]")
    if not bool(gram.isfinite().all()):
        raise Unquantizable("its inputs are too large: sums of their squares are not finite in float32")
    weight = weight.float()
    scale = weight_scale(weight, rule)
    # Large columns first: many columns after them can compensate their errors.
    order = gram.diagonal().argsort(descending=True, stable=True)
    scales = per_element(scale, width).expand_as(weight)[:, order]
    codes = _round_columns(weight[:, order], scales, _spread(gram[order][:, order]))
    return codes[:, order.argsort()].contiguous(), scale


def _spread(gram: Tensor) -> Tensor:
    """U, upper triangular float32, with U^T U = (gram + damping)^-1. In float64: gram is nearly singular."""
    h = gram.double()
    mean = h.diagonal().mean()
    h.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()


def _round_columns(weight: Tensor, scales: Tensor, spread: Tensor) -> Tensor:
    width = weight.shape[1]
    left = weight.T.contiguous()
    scales = scales.T.contiguous()
    codes = torch.empty_like(left)
    for start in range(0, width, COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, width)
        errors = torch.empty_like(left[start:stop])
        for k in range(start, stop):
            codes[k] = (left[k] / scales[k]).round_().clamp_(-CODE_MAX, CODE_MAX)
            errors[k - start] = (left[k] - codes[k] * scales[k]) / spread[k, k]
            left[k + 1 : stop] -= spread[k, k + 1 : stop, None] * errors[k - start]
        left[stop:] -= spread[start:stop, stop:].T @ errors
    return codes.T.to(torch.int8)
