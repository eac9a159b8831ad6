"""int8 x int8 -> int32 matrix product with the whole Linear in its epilogue: scales, bias, gate, residual.

Both operands are stored with the summed index innermost ([T, K] and [N, K]), which int8 tensor cores require.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.epilogue import MAX_PIECE, Epilogue, Form, finish_tile
from kernels.hopper.common import can_copy
from kernels.hopper.cooperative import launch_cooperative
from kernels.hopper.pingpong import launch_pingpong
from kernels.hopper.stream import launch_stream
from kernels.launching import MAX_PLANS, Plan, cdiv
from kernels.quantize import quantize_rows, quantized
from kernels.quantized import Quantized, ToInt8
from kernels.tiles import Tile, choose, current_gpu

__all__ = ["MAX_DEPTH", "int8_gated_linear", "int8_linear", "int8_matmul"]

MAX_DEPTH = (2**31 - 1) // (128 * 128)
"""Largest K whose int32 accumulator cannot overflow with codes of -128: 131,071."""

FOR_MANY = {"pingpong": launch_pingpong, "cooperative": launch_cooperative}
"""Hopper's own kernels for many tokens."""

FALLBACK = Tile("plain", 128, 128, 128, num_warps=8, num_stages=3)
"""The tile in place of one of those, for epilogues and alignments that they do not support."""


def int8_matmul(x_q: Tensor, weight_q: Tensor) -> Tensor:
    """Multiply int8 by int8 exactly. See reference.int8_matmul.

    Raises:
        ValueError: K differs between the two, weight_q is not contiguous, or K is above `MAX_DEPTH`.
    """
    y = torch.empty((len(x_q), len(weight_q)), dtype=torch.int32, device=x_q.device)
    launch(x_q.contiguous(), weight_q, Epilogue(), y)
    return y


def int8_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Apply a W8A8 Linear in one kernel. See reference.int8_linear.

    A row of y has the same bits in every batch: int32 sums are exact, and the rest is per element and in one order.

    Raises:
        ValueError: K differs between x and weight_q, weight_q is not contiguous, K is above `MAX_DEPTH`, or a scale,
            the bias or the residual does not have one of the shapes that the reference names.
    """
    codes = x.codes.contiguous()
    T, N = codes.shape[0], weight_q.shape[0]
    _check_operands(T, N, x.scale, weight_scale, bias)
    if residual is not None and residual.shape != (T, N):
        raise ValueError(f"residual {tuple(residual.shape)} must be {(T, N)}")
    y = torch.empty((T, N), dtype=out_dtype, device=codes.device)
    residual = None if residual is None else residual.contiguous()
    launch(codes, weight_q, Epilogue(x.scale, weight_scale, bias, residual), y)
    return y


def int8_gated_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    quantize: ToInt8 | None = None,
) -> Tensor | Quantized:
    """Apply a W8A8 Linear whose outputs are pairs of gate and up, and gate them. See reference.int8_gated_linear.

    The gate is part of the product's epilogue, so the product itself is not written. Scales per row take a second
    kernel, which reads y once; the first writes the largest magnitude of each piece of a row for it.

    Raises:
        ValueError: as `int8_linear`, or N is odd.
    """
    codes = x.codes.contiguous()
    T, N = codes.shape[0], weight_q.shape[0]
    if N % 2:
        raise ValueError(f"weight_q has {N} rows; pairs of gate and up are an even number")
    _check_operands(T, N, x.scale, weight_scale, bias)
    width = N // 2
    ops = Epilogue(x.scale, weight_scale, bias)
    y = torch.empty((T, width), dtype=out_dtype, device=codes.device)
    tile = pick_tile(codes, weight_q, ops, y)
    if quantize is None or quantize.scale is not None:
        launch(codes, weight_q, ops, y, tile, is_gated=True)
        return quantized(y, quantize)
    pieces = cdiv(width, min(tile.block_n, MAX_PIECE.value) // 2)
    row_max = torch.empty((T, pieces), dtype=torch.float32, device=y.device)
    launch(codes, weight_q, ops._replace(row_max=row_max), y, tile, is_gated=True)
    return quantize_rows(y, row_max)


def _check_operands(T: int, N: int, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    if x_scale.ndim != 1 or x_scale.numel() not in {1, T} or weight_scale.numel() not in {1, N}:
        raise ValueError(f"scales of {x_scale.numel()} rows and {weight_scale.numel()} columns for y [{T}, {N}]")
    if bias is not None and bias.numel() != N:
        raise ValueError(f"bias has {bias.numel()} elements, weight_q {N} rows")


def launch(
    x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor, tile: Tile | None = None, is_gated: bool = False
) -> None:
    """Fill y with the given tile, or else with the table's. Without scales y is the accumulator."""
    (T, K), (N, depth) = x_q.shape, weight_q.shape
    if depth != K or not weight_q.is_contiguous():
        raise ValueError(f"weight_q {tuple(weight_q.shape)} must be [N, {K}] and contiguous, for x of depth {K}")
    if K > MAX_DEPTH:
        raise ValueError(f"K = {K} can overflow the int32 accumulator; the limit is {MAX_DEPTH}")
    if T == 0:
        return
    tile = tile or pick_tile(x_q, weight_q, ops, y)
    is_per_row = ops.x_scale is not None and ops.x_scale.numel() == T
    form = Form(is_per_row, ops.weight_scale is not None and ops.weight_scale.numel() == N, is_gated)
    num_tiles = cdiv(T, tile.block_t) * cdiv(N, tile.block_n)
    if tile.kernel == "stream":
        launch_stream(x_q, weight_q, ops, y, tile, num_tiles, form)
    elif tile.kernel in FOR_MANY:
        num_programs = min(num_tiles, current_gpu(y.device).num_sms)
        FOR_MANY[tile.kernel](x_q, weight_q, ops, y, tile, num_programs, form)
    else:
        plan = _plan(tile, form, K % tile.block_k == 0, starts_early(y.device, T))
        plan.launch((num_tiles, 1, 1), x_q, weight_q, ops, y, T, N, K)


@lru_cache(maxsize=MAX_PLANS)
def _plan(tile: Tile, form: Form, is_even: bool, is_early: bool) -> Plan:
    kernel = _int8_linear_kernel if tile.kernel == "plain" else _int8_linear_swapped_kernel
    return Plan(
        kernel, **form._asdict(), EVEN_K=is_even, **launch_options(tile), DEPENDENT=is_early, launch_pdl=is_early
    )


def pick_tile(x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor) -> Tile:
    """The table's tile, or one like it of a kernel that supports these operands."""
    T, K = x_q.shape
    tile = choose(current_gpu(y.device), weight_q.shape[0], K, T)
    is_gluon = tile.kernel == "stream" or tile.kernel in FOR_MANY
    return tile if not is_gluon or can_copy(x_q, weight_q, ops, y) else fallback(tile)


def fallback(tile: Tile) -> Tile:
    """The tile in place of one of a Gluon kernel, for epilogues and alignments that it does not support."""
    if tile.kernel == "stream":
        return Tile("swapped", min(tile.block_t, 64), 64, 256, num_warps=4, num_stages=4)
    return FALLBACK


def launch_options(tile: Tile) -> dict[str, int | bool]:
    """The compile-time arguments of every kernel that follow from the tile."""
    return {
        "GROUP": tile.group,
        "BLOCK_T": tile.block_t,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


# T changes with every step: specialized on its value (1, or a multiple of 16), three kernels would be compiled.
@triton.jit(do_not_specialize=["T"])
def _int8_linear_kernel(
    x_ptr,
    weight_ptr,
    ops,
    y_ptr,
    T,
    N,
    K,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One tile [BLOCK_T, BLOCK_N] of y, tokens on the M side of the matrix instruction."""
    num_n = tl.cdiv(N, BLOCK_N)
    tile_t, tile_n = tl.swizzle2d(
        tl.program_id(0) // num_n, tl.program_id(0) % num_n, tl.cdiv(T, BLOCK_T), num_n, GROUP
    )
    tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    await_inputs(DEPENDENT)
    # Columns past the end repeat the last one, so that only the store needs a mask. Tokens past the end do not: with
    # T = 1 all programs would load the same line 16 times, and T = 1 took longer than T = 16.
    is_token = (tokens < T)[:, None]
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * K + depth[None, :]
    weight_ptrs = weight_ptr + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * K + depth[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=is_token, other=0)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=is_token & (depth[None, :] < K - start), other=0)
            weight = tl.load(weight_ptrs, mask=depth[:, None] < K - start, other=0)
        acc = tl.dot(x, weight, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    launch_dependents(DEPENDENT)
    finish_tile(acc, ops, y_ptr, tokens, tile_n * BLOCK_N, T, N, PER_ROW, PER_COLUMN, GATED)


@triton.jit(do_not_specialize=["T"])
def _int8_linear_swapped_kernel(
    x_ptr,
    weight_ptr,
    ops,
    y_ptr,
    T,
    N,
    K,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One tile of y computed as y^T = weight x^T, for few tokens: the weight's rows fill the instruction's M side."""
    num_n = tl.cdiv(N, BLOCK_N)
    tile_t, tile_n = tl.swizzle2d(
        tl.program_id(0) // num_n, tl.program_id(0) % num_n, tl.cdiv(T, BLOCK_T), num_n, GROUP
    )
    tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    await_inputs(DEPENDENT)
    is_token = (tokens < T)[None, :]
    x_ptrs = x_ptr + tokens.to(tl.int64)[None, :] * K + depth[:, None]
    weight_ptrs = weight_ptr + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + depth[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.int32)
    for start in range(0, K, BLOCK_K):
        # The weights are read once; kept in the L2 cache they would only replace the activations.
        if EVEN_K:
            x = tl.load(x_ptrs, mask=is_token, other=0)
            weight = tl.load(weight_ptrs, eviction_policy="evict_first")
        else:
            x = tl.load(x_ptrs, mask=is_token & (depth[:, None] < K - start), other=0)
            weight = tl.load(weight_ptrs, mask=depth[None, :] < K - start, other=0, eviction_policy="evict_first")
        acc = tl.dot(weight, x, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    launch_dependents(DEPENDENT)
    finish_tile(tl.trans(acc), ops, y_ptr, tokens, tile_n * BLOCK_N, T, N, PER_ROW, PER_COLUMN, GATED)
