"""Norms and activations, one row at a time."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.quantized import Quantized, ToInt8
from kernels.reference.common import ROWS_AT_ONCE, joined, row_slices, store


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Add the residual, then scale each row to unit root mean square.

    h = x + residual        y = h / sqrt(mean_k h^2 + eps) * weight

    Args:
        x: [T, K] float.
        weight: [K] float.
        eps: added to the mean square.
        residual: [T, K] of x's dtype, or None for h = x. h is rounded to x's dtype before it is normed.
        quantize: None writes y in x's dtype; `ToInt8` writes codes and scale of the float32 y.

    Returns:
        y, and h [T, K] in x's dtype (x itself where there is no residual).

    Source: RMSNorm (arXiv 1910.07467), equation 4; fusion after ZeroQuant, section 4.3.
    """
    summed = x if residual is None else x + residual
    h = summed.float()
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    inverse = (norm * norm / h.shape[-1] + eps).rsqrt_()
    return store((h * inverse).mul_(weight), x.dtype, quantize), summed


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Add the residual, then shift and scale each row to mean 0 and variance 1.

    h = x + residual        y = (h - mean_k h) / sqrt(var_k h + eps) * weight + bias

    Args and returns: as `rms_norm`, with bias [K] or None.

    Source: layer normalization (arXiv 1607.06450), equation 4.
    """
    summed = x if residual is None else x + residual
    y = F.layer_norm(summed.float(), weight.shape, weight.float(), None if bias is None else bias.float(), eps)
    return store(y, x.dtype, quantize), summed


def silu_mul(gate_up: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """Gate the second half of each row by SiLU of the first.

    y = silu(gate) * up        silu(g) = g / (1 + exp(-g))

    Args:
        gate_up: [T, 2F] float, the gate in columns 0..F-1, up in F..2F-1.
        quantize: None writes [T, F] in gate_up's dtype; `ToInt8` writes codes and scale of the float32 y.

    Source: GLU variants (arXiv 2002.05202), SwiGLU.
    """
    if len(gate_up) > ROWS_AT_ONCE:
        return joined([silu_mul(gate_up[rows], quantize) for rows in row_slices(len(gate_up))])
    gate, up = gate_up.float().chunk(2, dim=-1)
    return store(F.silu(gate).mul_(up), gate_up.dtype, quantize)


def gelu_mul(gate_up: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """Gate the second half of each row by GELU, in its tanh form, of the first.

    y = gelu(gate) * up

    Args: as `silu_mul`.

    Source: GLU variants (arXiv 2002.05202), GEGLU.
    """
    if len(gate_up) > ROWS_AT_ONCE:
        return joined([gelu_mul(gate_up[rows], quantize) for rows in row_slices(len(gate_up))])
    gate, up = gate_up.float().chunk(2, dim=-1)
    return store(F.gelu(gate, approximate="tanh").mul_(up), gate_up.dtype, quantize)


def gelu(
    x: Tensor, approximate: Literal["none", "tanh"] = "none", quantize: ToInt8 | None = None
) -> Tensor | Quantized:
    """Apply GELU, x * Phi(x), exactly or by its tanh form.

    Args:
        x: [T, K] float.
        approximate: "none" for the exact form.
        quantize: None writes [T, K] in x's dtype; `ToInt8` writes codes and scale of the float32 y.

    Source: GELU (arXiv 1606.08415), section 2.
    """
    return store(F.gelu(x.float(), approximate=approximate), x.dtype, quantize)


def relu(x: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """Apply max(x, 0); NaN stays NaN.

    Args:
        x: [T, K] float.
        quantize: None writes [T, K] in x's dtype; `ToInt8` writes codes and scale of y.
    """
    return store(F.relu(x.float()), x.dtype, quantize)
