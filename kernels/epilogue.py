"""What a Linear does with its int32 accumulator: scales, bias, gate, residual, store."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize import magnitude

__all__ = ["MAX_PIECE", "Epilogue", "Form", "dequantize", "finish_tile", "gate_pairs"]

MAX_PIECE = tl.constexpr(128)
"""Most columns of the accumulator that are finished at once: the epilogue of a wider tile would spill."""


class Epilogue(NamedTuple):
    """The operands of an epilogue, None for those that it lacks. Without scales y is the accumulator itself.

    x_scale: float32 [T] (PER_ROW) or [1].      weight_scale: float32 [N] (PER_COLUMN) or [1].
    bias: [N] float.                            residual: float, of y's shape.
    row_max: float32 [T, pieces], written: max |y| of each piece of a row.
    """

    x_scale: Tensor | None = None
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    row_max: Tensor | None = None


class Form(NamedTuple):
    """What an epilogue is compiled for: scales per row and per column or one for all, and whether pairs are gated."""

    PER_ROW: bool
    PER_COLUMN: bool
    GATED: bool


@triton.jit
def finish_tile(
    acc, ops, y_ptr, tokens, first, T, N, PER_ROW: tl.constexpr, PER_COLUMN: tl.constexpr, GATED: tl.constexpr
):
    """Finish and store the accumulator [tokens, columns first ..]."""
    if acc.shape[1] > MAX_PIECE:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), (0, 2, 1)))
        _finish_piece(left, ops, y_ptr, tokens, first, T, N, PER_ROW, PER_COLUMN, GATED)
        _finish_piece(right, ops, y_ptr, tokens, first + HALF, T, N, PER_ROW, PER_COLUMN, GATED)
    else:
        _finish_piece(acc, ops, y_ptr, tokens, first, T, N, PER_ROW, PER_COLUMN, GATED)


@triton.jit
def _finish_piece(
    acc, ops, y_ptr, tokens, first, T, N, PER_ROW: tl.constexpr, PER_COLUMN: tl.constexpr, GATED: tl.constexpr
):
    columns = first + tl.arange(0, acc.shape[1])
    if ops.weight_scale is None and ops.x_scale is None:
        at = tokens.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(y_ptr + at, acc, mask=(tokens < T)[:, None] & (columns < N)[None, :])
    else:
        y = dequantize(acc, ops, tokens, columns, T, N, PER_ROW, PER_COLUMN)
        if GATED:
            _store_piece(gate_pairs(y), ops, y_ptr, tokens, first // 2, T, N // 2)
        else:
            _store_piece(y, ops, y_ptr, tokens, first, T, N)


@triton.jit
def gate_pairs(y):
    """silu(gate) * up of neighbouring columns: row 2f of the weights is gate f, row 2f + 1 is up f."""
    gate, up = tl.split(tl.reshape(y, [y.shape[0], y.shape[1] // 2, 2]))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def dequantize(acc, ops, tokens, columns, T, N, PER_ROW: tl.constexpr, PER_COLUMN: tl.constexpr):
    """The accumulator [tokens, columns] as float32, scaled, with its bias."""
    y = acc.to(tl.float32)
    if PER_COLUMN:
        y *= tl.load(ops.weight_scale + columns, mask=columns < N, other=0.0)[None, :]
    elif ops.weight_scale is not None:
        y *= tl.load(ops.weight_scale)
    if PER_ROW:
        y *= tl.load(ops.x_scale + tokens, mask=tokens < T, other=0.0)[:, None]
    elif ops.x_scale is not None:
        y *= tl.load(ops.x_scale)
    if ops.bias is not None:
        y += tl.load(ops.bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _store_piece(y, ops, y_ptr, tokens, first, T, N):
    """Store float32 y in y_ptr's dtype; N is the width of y as stored."""
    columns = first + tl.arange(0, y.shape[1])
    mask = (tokens < T)[:, None] & (columns < N)[None, :]
    at = tokens.to(tl.int64)[:, None] * N + columns[None, :]
    if ops.residual is not None:
        y += tl.load(ops.residual + at, mask=mask, other=0.0).to(tl.float32)
    stored = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, stored, mask=mask)
    if ops.row_max is not None:
        # The maximum of the stored values, which are the ones that will be quantized.
        at_piece = tokens.to(tl.int64) * tl.cdiv(N, y.shape[1]) + first // y.shape[1]
        row_max = tl.max(tl.where(mask, magnitude(stored.to(tl.float32)), 0.0), axis=1)
        tl.store(ops.row_max + at_piece, row_max, mask=(tokens < T) & (first < N))
