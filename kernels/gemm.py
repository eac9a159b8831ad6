"""int8 x int8 -> int32 matrix product with the whole Linear in its epilogue: scales, bias, residual, requantization.

Both operands are stored with the summed index innermost ([T, K] and [N, K]), as the int8 tensor cores want them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize import to_codes
from kernels.quantized import CODE_MAX, Quantized
from kernels.tiles import Tile, choose, current_gpu

__all__ = ["MAX_DEPTH", "int8_linear", "int8_matmul"]

MAX_DEPTH = (2**31 - 1) // (CODE_MAX * CODE_MAX)
"""Largest K whose int32 accumulator cannot overflow: 133,144."""

MAX_EPILOGUE = tl.constexpr(128)


def int8_matmul(x_q: Tensor, weight_q: Tensor) -> Tensor:
    """Multiply int8 by int8 exactly: accumulator [T, N] int32 = x_q [T, K] @ weight_q [N, K]^T.

    Raises:
        ValueError: K differs between the two, weight_q is not contiguous, or K is above `MAX_DEPTH`.
    """
    y = torch.empty((len(x_q), len(weight_q)), dtype=torch.int32, device=x_q.device)
    launch(x_q.contiguous(), None, weight_q, None, None, None, y, None)
    return y


def int8_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    out_scale: Tensor | None = None,
) -> Tensor | Quantized:
    """Apply a W8A8 Linear in one kernel; `reference.int8_linear`.

    acc = x_q @ weight_q^T  (int32)        y_tn = acc_tn * x_scale_t * weight_scale_n + bias_n + residual_tn

    Args:
        x: codes [T, K], scale [T] or [1].
        weight_q: [N, K] int8, contiguous.
        weight_scale: float32 [N] (per output channel) or [1] (per tensor).
        bias: [N] float or None.
        residual: [T, N] float or None.
        out_dtype: float16, bfloat16 or float32; of y where out_scale is None.
        out_scale: float32 [1]: write y as `Quantized` with this static scale instead.

    Returns:
        y [T, N], the same bits for a row whatever else is in the batch: the sum is exact, the rest is per element.

    Raises:
        ValueError: K differs between x and weight_q, weight_q is not contiguous, K is above `MAX_DEPTH`, or a scale,
            the bias or the residual does not have one of the shapes above.

    Source: SmoothQuant (arXiv 2211.10438), equation 2.
    """
    codes = x.codes.contiguous()
    T, N = len(codes), len(weight_q)
    if x.scale.numel() not in {1, T} or weight_scale.numel() not in {1, N}:
        raise ValueError(f"scales of {x.scale.numel()} rows and {weight_scale.numel()} columns for y [{T}, {N}]")
    if bias is not None and bias.numel() != N:
        raise ValueError(f"bias has {bias.numel()} elements, weight_q {N} rows")
    if residual is not None and residual.shape != (T, N):
        raise ValueError(f"residual {tuple(residual.shape)} must be {(T, N)}")
    y = torch.empty((T, N), dtype=out_dtype if out_scale is None else torch.int8, device=codes.device)
    residual = None if residual is None else residual.contiguous()
    launch(codes, x.scale, weight_q, weight_scale, bias, residual, y, out_scale)
    return y if out_scale is None else Quantized(y, out_scale)


def launch(
    x_q: Tensor,
    x_scale: Tensor | None,
    weight_q: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    out_scale: Tensor | None,
    tile: Tile | None = None,
) -> None:
    """Fill y by the tile given, or else by the one that the table names. Without scales y is the accumulator."""
    (T, K), N = x_q.shape, len(weight_q)
    if weight_q.shape[1] != K or not weight_q.is_contiguous():
        raise ValueError(f"weight_q {tuple(weight_q.shape)} must be [N, {K}] and contiguous, for x of depth {K}")
    if K > MAX_DEPTH:
        raise ValueError(f"K = {K} can overflow the int32 accumulator; the limit is {MAX_DEPTH}")
    tile = tile or choose(current_gpu(y.device), N, K, T)
    kernel = _int8_linear_kernel if tile.kernel == "plain" else _int8_linear_swapped_kernel
    kernel[(triton.cdiv(T, tile.block_t) * triton.cdiv(N, tile.block_n),)](
        x_q, weight_q, x_scale, weight_scale, bias, residual, y, out_scale, T, N, K,
        PER_ROW=x_scale is not None and x_scale.numel() == T,
        PER_COLUMN=weight_scale is not None and weight_scale.numel() == N,
        **launch_options(tile, K),
    )  # fmt: skip


def launch_options(tile: Tile, k: int) -> dict[str, int | bool]:
    """The compile-time arguments of either kernel that follow from the tile."""
    return {
        "EVEN_K": k % tile.block_k == 0,
        "GROUP": tile.group,
        "BLOCK_T": tile.block_t,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit
def _tile_position(T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """This program's token tile and column tile: column by column within groups of GROUP token tiles."""
    num_t = tl.cdiv(T, BLOCK_T)
    per_group = GROUP * tl.cdiv(N, BLOCK_N)
    first_t = tl.program_id(0) // per_group * GROUP
    group = tl.minimum(num_t - first_t, GROUP)
    within = tl.program_id(0) % per_group
    return first_t + within % group, within // group


@triton.jit
def _finish(
    acc,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    out_scale_ptr,
    tokens,
    first_column,
    T,
    N,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
):
    """Scale the accumulator [tokens, columns], add bias and residual, and store in y's dtype."""
    if acc.shape[1] > MAX_EPILOGUE:
        # In two halves: the accumulator fills half the registers, and the epilogue of all of it would spill.
        HALF: tl.constexpr = acc.shape[1] // 2
        halves = tl.reshape(acc, [acc.shape[0], 2, HALF])
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        _store_tile(left, x_scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, y_ptr, out_scale_ptr, tokens,
                    first_column + tl.arange(0, HALF), T, N, PER_ROW, PER_COLUMN)  # fmt: skip
        _store_tile(right, x_scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, y_ptr, out_scale_ptr, tokens,
                    first_column + HALF + tl.arange(0, HALF), T, N, PER_ROW, PER_COLUMN)  # fmt: skip
    else:
        _store_tile(acc, x_scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, y_ptr, out_scale_ptr, tokens,
                    first_column + tl.arange(0, acc.shape[1]), T, N, PER_ROW, PER_COLUMN)  # fmt: skip


@triton.jit
def _store_tile(
    acc,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    out_scale_ptr,
    tokens,
    columns,
    T,
    N,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
):
    has_token, has_column = tokens < T, columns < N
    mask = has_token[:, None] & has_column[None, :]
    at = tokens.to(tl.int64)[:, None] * N + columns[None, :]
    if weight_scale_ptr is None:
        tl.store(y_ptr + at, acc, mask=mask)
    else:
        y = acc.to(tl.float32)
        if PER_COLUMN:
            y *= tl.load(weight_scale_ptr + columns, mask=has_column, other=0.0)[None, :]
        else:
            y *= tl.load(weight_scale_ptr)
        if PER_ROW:
            y *= tl.load(x_scale_ptr + tokens, mask=has_token, other=0.0)[:, None]
        else:
            y *= tl.load(x_scale_ptr)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + columns, mask=has_column, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if out_scale_ptr is not None:
            tl.store(y_ptr + at, to_codes(y, tl.load(out_scale_ptr)), mask=mask)
        else:
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


# T changes with every step: specialized on its value (1, or a multiple of 16) it would compile three kernels for one.
@triton.jit(do_not_specialize=["T"])
def _int8_linear_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    out_scale_ptr,
    T,
    N,
    K,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_T, BLOCK_N] of y, tokens on the M side of the matrix instruction."""
    tile_t, tile_n = _tile_position(T, N, BLOCK_T, BLOCK_N, GROUP)
    tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one, so that only the store needs a mask.
    x_ptrs = x_ptr + tl.minimum(tokens, T - 1).to(tl.int64)[:, None] * K + depth[None, :]
    weight_ptrs = weight_ptr + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * K + depth[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=depth[None, :] < K - start, other=0)
            weight = tl.load(weight_ptrs, mask=depth[:, None] < K - start, other=0)
        acc = tl.dot(x, weight, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    _finish(acc, x_scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, y_ptr, out_scale_ptr, tokens,
            tile_n * BLOCK_N, T, N, PER_ROW, PER_COLUMN)  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _int8_linear_swapped_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    out_scale_ptr,
    T,
    N,
    K,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y computed as y^T = weight x^T, for few tokens: the weight's rows fill the instruction's M side."""
    tile_t, tile_n = _tile_position(T, N, BLOCK_T, BLOCK_N, GROUP)
    tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(tokens, T - 1).to(tl.int64)[None, :] * K + depth[:, None]
    weight_ptrs = weight_ptr + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + depth[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.int32)
    for start in range(0, K, BLOCK_K):
        # The weights are read once and would only push the activations out of the L2 cache.
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs, eviction_policy="evict_first")
        else:
            x = tl.load(x_ptrs, mask=depth[:, None] < K - start, other=0)
            weight = tl.load(weight_ptrs, mask=depth[None, :] < K - start, other=0, eviction_policy="evict_first")
        acc = tl.dot(weight, x, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    _finish(tl.trans(acc), x_scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, y_ptr, out_scale_ptr, tokens,
            tile_n * BLOCK_N, T, N, PER_ROW, PER_COLUMN)  # fmt: skip
