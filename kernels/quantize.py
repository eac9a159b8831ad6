"""Float tensors to int8 codes and scales, and the rounding that all kernels share which write int8."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.launching import MAX_PLANS, Plan, cdiv, power_of_2
from kernels.quantized import CODE_MAX, TINY, Quantized, ToInt8, require_scale

__all__ = ["MAX_BUSY_ROW", "MAX_ROW", "quantize_rows", "quantize_tensor"]

MAX_ROW = 32768
"""Longest row, in elements, of an op whose programs hold one row each: 64 registers a thread at 16 warps."""

MAX_BUSY_ROW = 16384
"""The same for norms and GELU, which hold twice as much at once; longer rows spill."""

MAX_PARTIALS = 256
CODE_LIMIT = tl.constexpr(float(CODE_MAX))
LOWEST_CODE = tl.constexpr(-128.0)
ZERO_BELOW = tl.constexpr(TINY)
# Adding and subtracting 1.5 * 2^23 leaves float32 no room for a fraction: round to nearest, ties to even.
ROUNDER = tl.constexpr(12582912.0)
# The interpreter's fma rounds twice.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def quantize_rows(x: Tensor, row_max: Tensor | None = None) -> Quantized:
    """Round each row of x to int8 with its own scale, in one pass. See reference.quantize_rows.

    A row that holds NaN or infinity gets scale infinity.

    Args:
        row_max: float32 [T, P], the largest element of whose row t is max_k |x_tk|, if the op before has found it. A
            row may then be of any length and is shared by several programs.

    Raises:
        ValueError: K is above `MAX_ROW` and row_max is not given.
    """
    x = with_unit_stride(x)
    T, K = x.shape
    codes, scale = empty_output(x, K, ToInt8())
    assert scale is not None
    pieces = 0 if row_max is None else row_max.shape[1]
    plan, programs = row_plan(
        _quantize_rows_kernel, K, starts_early(x.device, T), one_program=row_max is None,
        PIECES=power_of_2(max(1, pieces)),
    )  # fmt: skip
    plan.launch((T, programs, 1), x, row_max, codes, scale, K, x.stride(0), pieces)
    return Quantized(codes, scale)


def quantize_tensor(x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Quantized:
    """Round all of x to int8 with one scale, in one pass, or two to find the scale. See reference.quantize_tensor.

    Raises:
        ValueError: a zero point without a scale.
    """
    require_scale(scale, zero_point)
    x = with_unit_stride(x)
    T, K = x.shape
    codes = torch.empty((T, K), dtype=torch.int8, device=x.device)
    block, is_early = min(4096, power_of_2(max(K, 1))), starts_early(x.device, T)
    partial, num_partials, found = None, 1, scale
    if found is None:
        found = torch.empty(1, dtype=torch.float32, device=x.device)
        num_partials = min(MAX_PARTIALS, power_of_2(max(T, 1)))
        partial = torch.empty(num_partials, dtype=torch.float32, device=x.device)
        _absmax_plan(block, is_early).launch((num_partials, 1, 1), x, partial, T, K, x.stride(0))
    plan = _tensor_plan(num_partials, block, is_early)
    plan.launch((T, cdiv(K, block), 1), x, partial, codes, found, zero_point, K, x.stride(0))
    return Quantized(codes, found)


@lru_cache(maxsize=MAX_PLANS)
def _absmax_plan(block: int, is_early: bool) -> Plan:
    return Plan(_absmax_kernel, BLOCK=block, DEPENDENT=is_early, launch_pdl=is_early)


@lru_cache(maxsize=MAX_PLANS)
def _tensor_plan(num_partials: int, block: int, is_early: bool) -> Plan:
    return Plan(
        _quantize_tensor_kernel, NUM_PARTIALS=num_partials, BLOCK=block, DEPENDENT=is_early, launch_pdl=is_early
    )


def quantized(y: Tensor, quantize: ToInt8 | None) -> Tensor | Quantized:
    """y [T, K] unchanged, or its codes and scale.

    Raises:
        ValueError: K is above `MAX_ROW` and each row's scale is to be found.
    """
    if quantize is None:
        return y
    return quantize_rows(y) if quantize.scale is None else quantize_tensor(y, quantize.scale)


def with_unit_stride(x: Tensor) -> Tensor:
    """x [T, K] with contiguous rows, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=MAX_PLANS)
def row_plan(
    kernel: Any,
    num_columns: int,
    is_early: bool,
    max_row: int = MAX_ROW,
    one_program: bool = True,
    per_warp: int = 512,
    **constants: int,
) -> tuple[Plan, int]:
    """Plan and programs per row of a kernel over rows: one, or several if nothing is summed along a row.

    Args:
        per_warp: elements of a long row for each warp. It must not depend on the rows: it decides the order of sums.
        constants: compile-time arguments other than BLOCK and DEPENDENT.

    Raises:
        ValueError: one program has to hold a row longer than max_row.
    """
    block = max(32, power_of_2(max(1, num_columns)))
    if not one_program:
        block = min(block, 2048)
    elif num_columns > max_row:
        raise ValueError(f"a row of K = {num_columns} elements is too long for one program; the limit is {max_row}")
    num_warps = min(16, max(8, block // per_warp)) if block > 2048 else max(1, block // 256)
    options = {"BLOCK": block, "num_warps": num_warps, "DEPENDENT": is_early, "launch_pdl": is_early}
    return Plan(kernel, **constants, **options), cdiv(num_columns, block)


def empty_output(x: Tensor, num_columns: int, quantize: ToInt8 | None) -> tuple[Tensor, Tensor | None]:
    """An empty [T, num_columns] in x's dtype and None, or empty int8 codes and the scale to write or to read."""
    shape = (x.shape[0], num_columns)
    if quantize is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device), None
    scale = quantize.scale
    if scale is None:
        scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return torch.empty(shape, dtype=torch.int8, device=x.device), scale


def is_static(quantize: ToInt8 | None) -> bool:
    """Whether the scale is read instead of written."""
    return quantize is not None and quantize.scale is not None


def is_dynamic(quantize: ToInt8 | None) -> bool:
    """Whether each row's scale is found by the kernel, which then needs the whole row."""
    return quantize is not None and quantize.scale is None


@triton.jit
def to_codes(y, scale):
    """clamp(rint(y / scale), -128, 127) as int8. NaN becomes 0; the scale of its row is then not finite."""
    return _to_codes_between(y, scale, LOWEST_CODE, CODE_LIMIT, 0)


@triton.jit
def to_shifted_codes(y, scale, zero_point):
    """clamp(rint(y / scale) + zero_point, -128, 127) as int8. NaN becomes 0, as in the symmetric form."""
    return _to_codes_between(y, scale, LOWEST_CODE - zero_point, CODE_LIMIT - zero_point, zero_point)


@triton.jit
def _to_codes_between(y, scale, low, high, shift):
    """rint(y / scale), held between two whole numbers, plus shift."""
    y = tl.minimum(y, scale * high, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(y, scale * low, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:
        code = tl.div_rn(y, scale)
    else:
        # IEEE division in three instructions: the quotient by the rounded inverse is corrected by its remainder
        # (Markstein, 1990). tl.div_rn takes ten, which would limit the ops that write codes.
        inverse = tl.div_rn(1.0, scale)
        code = y * inverse
        code = tl.fma(tl.fma(-code, scale, y), inverse, code)
    # The code is in the low bits of the sum.
    return tl.where(code == code, (code + ROUNDER).to(tl.int32, bitcast=True) + shift, 0).to(tl.int8)


@triton.jit
def to_scale(absmax):
    """absmax / 127, or 1 if absmax counts as zero."""
    return tl.where(absmax < ZERO_BELOW, 1.0, tl.div_rn(absmax, CODE_LIMIT))


@triton.jit
def magnitude(y):
    """|y|, infinity for NaN, so that a maximum keeps the fault."""
    return tl.where(y == y, tl.abs(y), float("inf"))


@triton.jit
def load_row(row_ptr, columns, mask):
    """One row as float32, 0 beyond its end."""
    return tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(y, y_ptr, scale_ptr, row, columns, mask, K, STATIC: tl.constexpr):
    """Write one row of float32 y [K], 0 beyond the mask: as floats, or as codes with a scale that is found or given."""
    out = y_ptr + row.to(tl.int64) * K + columns
    if scale_ptr is None:
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)
    elif STATIC:
        tl.store(out, to_codes(y, tl.load(scale_ptr)), mask=mask)
    else:
        scale = to_scale(tl.max(magnitude(y), axis=0))
        tl.store(scale_ptr + row, scale)
        tl.store(out, to_codes(y, scale), mask=mask)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    row_max_ptr,
    codes_ptr,
    scale_ptr,
    K,
    stride_t,
    num_pieces,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row, or BLOCK columns of it if row_max_ptr is given."""
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    x = load_row(x_ptr + row.to(tl.int64) * stride_t, columns, mask)
    if row_max_ptr is None:
        store_row(x, codes_ptr, scale_ptr, row, columns, mask, K, STATIC=False)
    else:
        pieces = tl.arange(0, PIECES)
        row_max = tl.load(row_max_ptr + row.to(tl.int64) * num_pieces + pieces, mask=pieces < num_pieces, other=0.0)
        scale = to_scale(tl.max(row_max, axis=0))
        tl.store(scale_ptr + row, scale, mask=tl.program_id(1) == 0)
        tl.store(codes_ptr + row.to(tl.int64) * K + columns, to_codes(x, scale), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _absmax_kernel(x_ptr, partial_ptr, T, K, stride_t, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """The largest magnitude of every num_programs-th row."""
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    absmax = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), T, tl.num_programs(0)):
        row_ptr = x_ptr + tl.cast(row, tl.int64) * stride_t
        for start in range(0, K, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            absmax = tl.maximum(absmax, magnitude(load_row(row_ptr, columns, columns < K)))
    tl.store(partial_ptr + tl.program_id(0), tl.max(absmax, axis=0))


@triton.jit
def _quantize_tensor_kernel(
    x_ptr,
    partial_ptr,
    codes_ptr,
    scale_ptr,
    zero_point_ptr,
    K,
    stride_t,
    NUM_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    x = load_row(x_ptr + row.to(tl.int64) * stride_t, columns, mask)
    if partial_ptr is None:
        scale = tl.load(scale_ptr)
    else:
        scale = to_scale(tl.max(tl.load(partial_ptr + tl.arange(0, NUM_PARTIALS)), axis=0))
        tl.store(scale_ptr, scale, mask=(row == 0) & (tl.program_id(1) == 0))
    if zero_point_ptr is None:
        codes = to_codes(x, scale)
    else:
        codes = to_shifted_codes(x, scale, tl.load(zero_point_ptr).to(tl.int32))
    tl.store(codes_ptr + row.to(tl.int64) * K + columns, codes, mask=mask)
