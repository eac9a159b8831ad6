"""LLM.int8(): an int8 product of most columns of an activation, and a float product of the few with outliers.

The columns are found on the device in every step. Their list and count stay there and control the float product, so a
step can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.gemm import int8_linear
from kernels.launching import MAX_PLANS, Plan, cdiv
from kernels.quantize import empty_output, load_row, magnitude, row_plan, store_row, with_unit_stride
from kernels.quantized import Outliers, Quantized, ToInt8

__all__ = ["int8_outlier_linear", "split_outliers"]

FEW_ROWS = 16
FOUND_AT_ONCE, LISTED_AT_ONCE = 32, 4096
"""Columns of a program that finds outliers (64 bytes of a row), and of an iteration of the program that lists them."""


def int8_outlier_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    threshold: float = 6.0,
) -> Tensor:
    """Apply a Linear in int8, its input columns with outliers in float. See reference.int8_outlier_linear.

    The float product multiplies the weight's codes, which are exact in x's dtype, with float32 sums. Without outliers
    it costs only its launch.

    Raises:
        ValueError: as `split_outliers` and `int8_linear`.
    """
    x = with_unit_stride(x)
    x_q, outliers = split_outliers(x, threshold)
    y = int8_linear(x_q, weight_q, weight_scale, bias, residual, out_dtype)
    _add_outliers(y, x, outliers, weight_q, weight_scale)
    return y


def split_outliers(x: Tensor, threshold: float) -> tuple[Quantized, Outliers]:
    """Round each row of x to int8 without its outlier columns, and list those. See reference.split_outliers.

    Raises:
        ValueError: K is above `MAX_ROW`.
    """
    x = with_unit_stride(x)
    T, K = x.shape
    is_early = starts_early(x.device, T)
    others, programs = row_plan(_quantize_others_kernel, K, is_early)
    codes, scale = empty_output(x, K, ToInt8())
    assert scale is not None
    columns = torch.empty(K, dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    is_outlier = torch.empty(K, dtype=torch.int8, device=x.device)
    find = _find_plan(T <= FEW_ROWS, is_early)
    find.launch((cdiv(K, FOUND_AT_ONCE), 1, 1), x, is_outlier, T, K, x.stride(0), threshold)
    _list_plan(is_early).launch((1, 1, 1), is_outlier, columns, count, K)
    others.launch((T, programs, 1), x, is_outlier, codes, scale, K, x.stride(0))
    return Quantized(codes, scale), Outliers(columns, count)


def _add_outliers(y: Tensor, x: Tensor, outliers: Outliers, weight_q: Tensor, weight_scale: Tensor) -> None:
    """y [T, N] += weight_scale_n * sum over outlier columns of x_tk * weight_q_nk, in place."""
    (T, K), N = x.shape, weight_q.shape[0]
    if T == 0:
        return
    block_t, block_n = (16, 64) if T <= FEW_ROWS else (32, 64) if x.dtype == torch.float32 else (64, 128)
    _add_plan(block_t, block_n, weight_scale.numel() == N, starts_early(y.device, T)).launch(
        (cdiv(T, block_t), cdiv(N, block_n), 1), x, outliers.columns, outliers.num_columns, weight_q, weight_scale, y,
        T, N, K, x.stride(0),
    )  # fmt: skip


@lru_cache(maxsize=MAX_PLANS)
def _find_plan(is_few: bool, is_early: bool) -> Plan:
    return Plan(
        _find_outliers_kernel, ROWS=FEW_ROWS if is_few else 128, BLOCK=FOUND_AT_ONCE, num_warps=1 if is_few else 4,
        DEPENDENT=is_early, launch_pdl=is_early,
    )  # fmt: skip


@lru_cache(maxsize=MAX_PLANS)
def _list_plan(is_early: bool) -> Plan:
    return Plan(_list_outliers_kernel, BLOCK=LISTED_AT_ONCE, num_warps=8, DEPENDENT=is_early, launch_pdl=is_early)


@lru_cache(maxsize=MAX_PLANS)
def _add_plan(block_t: int, block_n: int, is_per_column: bool, is_early: bool) -> Plan:
    return Plan(
        _add_outliers_kernel, PER_COLUMN=is_per_column, BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=16, num_warps=4,
        DEPENDENT=is_early, launch_pdl=is_early,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _find_outliers_kernel(
    x_ptr, is_outlier_ptr, T, K, stride_t, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """BLOCK columns of all rows: 1 for a column that holds an outlier, else 0."""
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, T, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        x = tl.load(x_ptr + rows.to(tl.int64) * stride_t + columns, mask=(rows < T) & mask, other=0.0)
        largest = tl.maximum(largest, magnitude(x.to(tl.float32)))
    tl.store(is_outlier_ptr + columns, (tl.max(largest, axis=0) >= threshold).to(tl.int8), mask=mask)


@triton.jit
def _list_outliers_kernel(is_outlier_ptr, columns_ptr, count_ptr, K, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One program: the columns with an outlier, in order, and their number."""
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    count = tl.zeros([], tl.int32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_outlier = tl.load(is_outlier_ptr + columns, mask=columns < K, other=0).to(tl.int32)
        place = count + tl.cumsum(is_outlier, axis=0) - 1
        tl.store(columns_ptr + place, columns, mask=is_outlier != 0)
        count += tl.sum(is_outlier, axis=0)
    tl.store(count_ptr, count)


@triton.jit
def _quantize_others_kernel(
    x_ptr, is_outlier_ptr, codes_ptr, scale_ptr, K, stride_t, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """One row: codes and scale of the columns without an outlier, code 0 in the others."""
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    is_outlier = tl.load(is_outlier_ptr + columns, mask=mask, other=0) != 0
    x = load_row(x_ptr + row.to(tl.int64) * stride_t, columns, mask & ~is_outlier)
    store_row(x, codes_ptr, scale_ptr, row, columns, mask, K, STATIC=False)


@triton.jit(do_not_specialize=["T"])
def _add_outliers_kernel(
    x_ptr,
    columns_ptr,
    count_ptr,
    weight_ptr,
    weight_scale_ptr,
    y_ptr,
    T,
    N,
    K,
    stride_t,
    PER_COLUMN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Adds to one tile of y, in as many iterations as there are listed columns."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    count = tl.load(count_ptr)
    if count > 0:
        x_ptrs = x_ptr + tokens.to(tl.int64) * stride_t
        weight_ptrs = weight_ptr + tl.minimum(outputs, N - 1).to(tl.int64) * K
        acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, count, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            is_listed = place < count
            column = tl.load(columns_ptr + place, mask=is_listed, other=0)
            x = tl.load(x_ptrs + column[None, :], mask=(tokens < T) & is_listed[None, :], other=0.0)
            weight = tl.load(weight_ptrs + column[:, None], mask=is_listed[:, None], other=0)
            acc = tl.dot(x, weight.to(x.dtype), acc, input_precision="ieee")
        if PER_COLUMN:
            acc *= tl.load(weight_scale_ptr + outputs, mask=outputs < N, other=0.0)
        else:
            acc *= tl.load(weight_scale_ptr)
        mask = (tokens < T) & (outputs < N)
        y_ptrs = y_ptr + tokens.to(tl.int64) * N + outputs
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32) + acc
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
