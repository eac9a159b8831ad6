"""Products gated by SiLU or GELU, GELU and ReLU, written as floats or as int8 codes: one kernel and one pass each."""

from __future__ import annotations

from typing import Any, Literal

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.quantize import (
    MAX_BUSY_ROW,
    MAX_ROW,
    empty_output,
    is_dynamic,
    is_static,
    load_row,
    row_plan,
    store_row,
    with_unit_stride,
)
from kernels.quantized import Quantized, ToInt8

__all__ = ["gelu", "gelu_mul", "relu", "silu_mul"]


def silu_mul(gate_up: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """Gate the second half of each row by SiLU of the first. See reference.silu_mul.

    Raises:
        ValueError: F is above `MAX_ROW` and each row's scale is to be found.
    """
    return _launch(_silu_mul_kernel, gate_up, gate_up.shape[1] // 2, quantize)


def gelu_mul(gate_up: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """Gate the second half of each row by GELU, in its tanh form, of the first. See reference.gelu_mul.

    Raises:
        ValueError: F is above `MAX_ROW` and each row's scale is to be found.
    """
    return _launch(_gelu_mul_kernel, gate_up, gate_up.shape[1] // 2, quantize)


def gelu(
    x: Tensor, approximate: Literal["none", "tanh"] = "none", quantize: ToInt8 | None = None
) -> Tensor | Quantized:
    """Apply GELU, exactly or by its tanh form. See reference.gelu.

    Raises:
        ValueError: K is above `MAX_BUSY_ROW` and each row's scale is to be found.
    """
    return _launch(_gelu_kernel, x, x.shape[1], quantize, MAX_BUSY_ROW, TANH=approximate == "tanh")


def relu(x: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """Apply max(x, 0). See reference.relu.

    Raises:
        ValueError: K is above `MAX_ROW` and each row's scale is to be found.
    """
    return _launch(_relu_kernel, x, x.shape[1], quantize)


def _launch(
    kernel: Any, x: Tensor, num_columns: int, quantize: ToInt8 | None, max_row: int = MAX_ROW, **constants: bool
) -> Tensor | Quantized:
    """Run a kernel that writes [T, num_columns]: one program per row, or several if no row maximum is needed."""
    x = with_unit_stride(x)
    y, scale = empty_output(x, num_columns, quantize)
    T = x.shape[0]
    plan, programs = row_plan(
        kernel, num_columns, starts_early(y.device, T), max_row, is_dynamic(quantize), STATIC=is_static(quantize),
        **constants,
    )  # fmt: skip
    plan.launch((T, programs, 1), x, y, scale, num_columns, x.stride(0))
    return y if scale is None else Quantized(y, scale)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, y_ptr, scale_ptr, K, stride_t, STATIC: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    row_ptr = gate_up_ptr + row.to(tl.int64) * stride_t
    gate = load_row(row_ptr, columns, mask)
    y = gate / (1.0 + tl.exp(-gate)) * load_row(row_ptr + K, columns, mask)
    store_row(y, y_ptr, scale_ptr, row, columns, mask, K, STATIC)


@triton.jit
def _gelu_tanh(x):
    # (1 + tanh u) / 2 = 1 / (1 + exp(-2u)): needs no tanh, and nothing cancels for very negative x.
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _gelu_mul_kernel(
    gate_up_ptr, y_ptr, scale_ptr, K, stride_t, STATIC: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    row_ptr = gate_up_ptr + row.to(tl.int64) * stride_t
    y = _gelu_tanh(load_row(row_ptr, columns, mask)) * load_row(row_ptr + K, columns, mask)
    store_row(y, y_ptr, scale_ptr, row, columns, mask, K, STATIC)


@triton.jit
def _gelu_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    K,
    stride_t,
    TANH: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    x = load_row(x_ptr + row.to(tl.int64) * stride_t, columns, mask)
    y = _gelu_tanh(x) if TANH else 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    store_row(y, y_ptr, scale_ptr, row, columns, mask, K, STATIC)


@triton.jit
def _relu_kernel(
    x_ptr, y_ptr, scale_ptr, K, stride_t, STATIC: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    x = load_row(x_ptr + row.to(tl.int64) * stride_t, columns, mask)
    # Written so that NaN passes through: no comparison is true for it.
    store_row(tl.where(x < 0.0, 0.0, x), y_ptr, scale_ptr, row, columns, mask, K, STATIC)
