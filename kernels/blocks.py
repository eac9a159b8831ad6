"""The int8 product with scales along the summed index: of activations per 128 columns, of weights per group of them.

Such a scale cannot wait for the epilogue: each step of the product lies in one block or group, and its int32 sum
(exact, and below 2^24, so exact in float32 too) is scaled and added to a float32 accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, launch_early
from kernels.epilogue import Epilogue, finish_tile
from kernels.quantized import BLOCK
from kernels.tiles import Tile

__all__ = ["block_tile", "launch_blocks"]

SMALL_SMEM, LARGE_SMEM = 96 * 1024, 144 * 1024
"""Bytes of operands in flight: of a multiprocessor with 99 KB of shared memory, and of one with 163 KB or more."""


def block_tile(capability: int, k: int, t: int, reads_blocks: bool = True, width: int = 0) -> Tile:
    """The tile of a product of t tokens that reads blocks of x, writes blocks of y, or both.

    Args:
        capability: 90 for 9.0.
        reads_blocks: whether x has scales per block: two accumulators share the registers, and a step is one block.
        width: the columns that hold one block of y: 128, or 256 where y is gated. 0 where y is not written in blocks.
    """
    has_room = capability in {80, 90, 100}
    if width == 0:
        return _reading_tile(has_room, k, t)
    block_t = 16 if t <= 16 or k % 16 else min(64 if t <= 64 else 128, _tallest(capability, reads_blocks, width))
    block_k = BLOCK if reads_blocks else 32 if k % 16 else BLOCK if has_room else 64
    stages = (LARGE_SMEM if has_room else SMALL_SMEM) // ((block_t + width) * block_k)
    return Tile("plain", block_t, width, block_k, num_warps=4 if block_t == 16 else 8, num_stages=min(6, stages))


def _tallest(capability: int, reads_blocks: bool, width: int) -> int:
    """The rows that do not spill: 256 columns leave few registers, two accumulators of them even fewer."""
    if width == BLOCK:
        return 128
    if reads_blocks:
        return 64 if capability in {80, 90, 100} else 32
    return 128 if capability == 90 else 64


def _reading_tile(has_room: bool, k: int, t: int) -> Tile:
    """Where y is float: few tokens wait for the weights' bytes alone, so their tiles are narrow and of many stages."""
    if k % 16:
        return Tile("plain", 16, 32, BLOCK, num_warps=4, num_stages=2)
    if t <= 16:
        return Tile("plain", 16, 32, BLOCK, num_warps=4, num_stages=8 if has_room else 6)
    if t <= 128:
        return Tile("plain", 32 if t <= 32 else 64, 64, BLOCK, num_warps=4, num_stages=4)
    if has_room:
        return Tile("plain", 128, 128, BLOCK, num_warps=8, num_stages=4)
    return Tile("plain", 64, 128, BLOCK, num_warps=8, num_stages=3)


def launch_blocks(
    x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor, tile: Tile, per_column: bool, is_gated: bool
) -> None:
    """Fill y from x_q [T, K] and weight_q [N, K]: ops.x_scale is [T, ceil(K / 128)] or ops.weight_scale [N, groups]."""
    assert ops.x_scale is not None
    assert ops.weight_scale is not None
    (T, K), N = x_q.shape, len(weight_q)
    by_weight = ops.weight_scale.ndim == 2
    width = K // ops.weight_scale.shape[1] if by_weight else BLOCK
    assert width % tile.block_k == 0, tile
    scale = (ops.weight_scale if by_weight else ops.x_scale).contiguous()
    left = ops._replace(weight_scale=None) if by_weight else ops._replace(x_scale=None)
    num_tiles = triton.cdiv(T, tile.block_t) * triton.cdiv(N, tile.block_n)
    _int8_linear_blocks_kernel[(num_tiles,)](
        x_q, weight_q, scale, left, y, T, N, K, BY_WEIGHT=by_weight, WIDTH=width,
        PER_ROW=by_weight and ops.x_scale.numel() == T, PER_COLUMN=per_column, GATED=is_gated,
        EVEN_K=K % tile.block_k == 0, SWAPPED=tile.kernel == "swapped",
        GROUP=tile.group, BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_early(y.device, T),
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _int8_linear_blocks_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    ops,
    y_ptr,
    T,
    N,
    K,
    BY_WEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One tile of y, or where SWAPPED of y^T = weight x^T: a step multiplies BLOCK_K columns and scales what it gives.

    scale_ptr: [rows, cdiv(K, WIDTH)], of the weight's rows where BY_WEIGHT, else of x's.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    tile_t, tile_n = tl.swizzle2d(
        tl.program_id(0) // num_n, tl.program_id(0) % num_n, tl.cdiv(T, BLOCK_T), num_n, GROUP
    )
    tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)[None, :]
    await_inputs(DEPENDENT)
    is_token = tokens < T
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * K + depth
    weight_ptrs = weight_ptr + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + depth
    is_scaled = columns < N if BY_WEIGHT else is_token
    # Of columns in 32 bits: a thread keeps one for each of its many columns, and would spill.
    scale_at = (columns if BY_WEIGHT else tokens.to(tl.int64)) * tl.cdiv(K, WIDTH)
    # The axis of acc along which one scale is shared: acc is [columns, tokens] where SWAPPED.
    ACROSS: tl.constexpr = 1 if BY_WEIGHT == SWAPPED else 0
    acc = tl.zeros([BLOCK_N, BLOCK_T] if SWAPPED else [BLOCK_T, BLOCK_N], tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        scale = tl.load(scale_ptr + scale_at + step // (WIDTH // BLOCK_K), mask=is_scaled, other=0.0)
        if EVEN_K:
            x = tl.load(x_ptrs, mask=is_token[:, None], other=0)
            weight = tl.load(weight_ptrs)
        else:
            is_inside = depth < K - step * BLOCK_K
            x = tl.load(x_ptrs, mask=is_token[:, None] & is_inside, other=0)
            weight = tl.load(weight_ptrs, mask=is_inside, other=0)
        # Written as fma, so that no tile and no compiler rounds a row otherwise than another.
        if SWAPPED:
            part = tl.dot(weight, tl.trans(x), out_dtype=tl.int32)
        else:
            part = tl.dot(x, tl.trans(weight), out_dtype=tl.int32)
        acc = tl.fma(part.to(tl.float32), tl.expand_dims(scale, ACROSS), acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    launch_dependents(DEPENDENT)
    if SWAPPED:
        acc = tl.trans(acc)
    finish_tile(acc, ops, y_ptr, tokens, tile_n * BLOCK_N, T, N, PER_ROW, PER_COLUMN, GATED)
