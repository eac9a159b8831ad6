"""Residual add, RMSNorm or LayerNorm, and quantization of the result: one kernel, one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.quantize import MAX_BUSY_ROW, empty_output, is_static, load_row, row_plan, store_row, with_unit_stride
from kernels.quantized import Quantized, ToInt8

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Add the residual, then scale each row to unit root mean square. See reference.rms_norm.

    Raises:
        ValueError: K is above `MAX_BUSY_ROW`, or the residual is not of x's shape.
    """
    x, residual, h = _operands(x, residual)
    T, K = x.shape
    y, scale = empty_output(x, K, quantize)
    is_early = starts_early(x.device, T)
    plan, _ = row_plan(_rms_norm_kernel, K, is_early, MAX_BUSY_ROW, per_warp=256, STATIC=is_static(quantize))
    plan.launch((T, 1, 1), x, residual, weight, h, y, scale, K, x.stride(0), _row_stride(residual), eps)
    return y if scale is None else Quantized(y, scale), x if h is None else h


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Add the residual, then shift and scale each row to mean 0 and variance 1. See reference.layer_norm.

    Raises:
        ValueError: as `rms_norm`.
    """
    x, residual, h = _operands(x, residual)
    T, K = x.shape
    y, scale = empty_output(x, K, quantize)
    is_early = starts_early(x.device, T)
    plan, _ = row_plan(_layer_norm_kernel, K, is_early, MAX_BUSY_ROW, per_warp=256, STATIC=is_static(quantize))
    plan.launch((T, 1, 1), x, residual, weight, bias, h, y, scale, K, x.stride(0), _row_stride(residual), eps)
    return y if scale is None else Quantized(y, scale), x if h is None else h


def _operands(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x and residual as the kernel reads them, and an empty h if there is a residual."""
    rows = with_unit_stride(x)
    if residual is None:
        return rows, None, None
    if residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have x's shape {tuple(x.shape)}")
    return rows, with_unit_stride(residual), torch.empty_like(rows)


def _row_stride(residual: Tensor | None) -> int:
    return 0 if residual is None else residual.stride(0)


@triton.jit
def _load_sum(x_ptr, residual_ptr, h_ptr, row, columns, mask, K, stride_x, stride_residual):
    """h of one row as float32, rounded to the dtype that it is stored in."""
    row = row.to(tl.int64)
    h = load_row(x_ptr + row * stride_x, columns, mask)
    if residual_ptr is not None:
        h += load_row(residual_ptr + row * stride_residual, columns, mask)
        stored = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * K + columns, stored, mask=mask)
        h = stored.to(tl.float32)
    return h


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    h_ptr,
    y_ptr,
    scale_ptr,
    K,
    stride_x,
    stride_residual,
    eps,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    h = _load_sum(x_ptr, residual_ptr, h_ptr, row, columns, mask, K, stride_x, stride_residual)
    inverse = tl.rsqrt(tl.sum(h * h, axis=0) / K + eps)
    y = h * inverse * load_row(weight_ptr, columns, mask)
    store_row(y, y_ptr, scale_ptr, row, columns, mask, K, STATIC)


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    y_ptr,
    scale_ptr,
    K,
    stride_x,
    stride_residual,
    eps,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    h = _load_sum(x_ptr, residual_ptr, h_ptr, row, columns, mask, K, stride_x, stride_residual)
    centred = h - tl.sum(h, axis=0) / K
    # From the centred values: the mean of squares minus the square of the mean cancels if |mean| is large.
    variance = tl.sum(tl.where(mask, centred * centred, 0.0), axis=0) / K
    y = centred * tl.rsqrt(variance + eps) * load_row(weight_ptr, columns, mask)
    if bias_ptr is not None:
        y += load_row(bias_ptr, columns, mask)
    store_row(y, y_ptr, scale_ptr, row, columns, mask, K, STATIC)
