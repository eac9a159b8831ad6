"""Sums over ranks joined with the norm behind them, of all ranks at once."""

from __future__ import annotations

from torch import Tensor

from kernels.quantized import Quantized, ToInt8
from kernels.reference.elementwise import rms_norm


def all_reduce_rms_norm(
    parts: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Add up the ranks' summands and norm the sum: what every rank gets.

    s = sum_r x_r, in float32 from rank 0 on, rounded to x's dtype        h = s + residual        y = rms_norm(h)

    Args:
        parts: [N, T, K] float, the summands of N ranks.
        weight, eps, residual, quantize: as `rms_norm`.

    Returns:
        As `rms_norm` with a residual.

    Source: all-reduce with residual and norm in one kernel (FlashInfer's trtllm_allreduce_fusion).
    """
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return rms_norm(total.to(parts.dtype), weight, eps, residual, quantize)


def reduce_scatter_rms_norm(
    parts: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """The same results, each row's computed by the rank that owns it; only there is its h known.

    owner(t) = floor(t / ceil(T / N))

    Source: sequence parallelism (arXiv 2205.05198), with what the norm gives gathered instead of its input.
    """
    return all_reduce_rms_norm(parts, weight, eps, residual, quantize)
