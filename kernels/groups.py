"""The int8 product of weights whose every row has one scale per group of neighbouring columns.

Such a scale cannot be applied in the epilogue. Each step of the product is within one group; its int32 sum (exact, and
below 2^24, so exact in float32 too) is scaled and added to a float32 accumulator.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.epilogue import Epilogue, finish_tile
from kernels.gemm import launch_options
from kernels.launching import MAX_PLANS, Plan, cdiv
from kernels.quantized import Quantized, group_size_of
from kernels.tiles import Tile, current_gpu

__all__ = ["group_tile", "int8_group_linear"]

MAX_STEP = 128
"""Most columns that one step of the product multiplies."""

MAX_STAGES = 8


def int8_group_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Apply an int8 Linear whose weights have a scale per group of columns. See reference.int8_group_linear.

    A step multiplies min(group size, 128) columns on the tensor cores. A row of y has the same bits in every batch.

    Raises:
        ValueError: K differs between x and weight_q, weight_q is not contiguous, or a scale, the bias or the residual
            does not have the shape that the reference names.
    """
    codes = x.codes.contiguous()
    (T, K), N = codes.shape, len(weight_q)
    if weight_q.shape[1] != K or not weight_q.is_contiguous():
        raise ValueError(f"weight_q {tuple(weight_q.shape)} must be [N, {K}] and contiguous, for x of depth {K}")
    group_size = group_size_of(weight_q, weight_scale)
    if x.scale.shape not in {(1,), (T,)}:
        raise ValueError(f"x.scale {tuple(x.scale.shape)} must be {(T,)} or (1,)")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias {tuple(bias.shape)} must be {(N,)}")
    if residual is not None and residual.shape != (T, N):
        raise ValueError(f"residual {tuple(residual.shape)} must be {(T, N)}")
    y = torch.empty((T, N), dtype=out_dtype, device=codes.device)
    if T == 0:
        return y
    ops = Epilogue(x.scale, None, bias, None if residual is None else residual.contiguous())
    tile = group_tile(current_gpu(y.device).capability, T, group_size)
    num_tiles = cdiv(T, tile.block_t) * cdiv(N, tile.block_n)
    plan = _plan(tile, group_size, x.scale.numel() == T, starts_early(y.device, T))
    plan.launch((num_tiles, 1, 1), codes, weight_q, weight_scale.contiguous(), ops, y, T, N, K)
    return y


@lru_cache(maxsize=MAX_PLANS)
def _plan(tile: Tile, group_size: int, is_per_row: bool, is_early: bool) -> Plan:
    return Plan(
        _int8_group_linear_kernel, GROUP_SIZE=group_size, PER_ROW=is_per_row, **launch_options(tile),
        DEPENDENT=is_early, launch_pdl=is_early,
    )  # fmt: skip


def group_tile(capability: int, t: int, group_size: int) -> Tile:
    """The tile of a product of t tokens, each of whose steps is within one group. capability: 90 for 9.0.

    With few tokens the product is bound by the weights' bytes, so tiles are narrow and have many stages.
    """
    has_room = capability in {80, 90, 100}
    block_k = min(group_size, MAX_STEP)
    if t <= 16:
        block_t, block_n, num_warps, num_stages = 16, 32, 4, 8 if has_room else 6
    elif t <= 128:
        block_t, block_n, num_warps, num_stages = 32 if t <= 32 else 64, 64, 4, 4
    else:
        block_t, block_n, num_warps, num_stages = 128 if has_room else 64, 128, 8, 4 if has_room else 3
    if capability == 100 and block_t > 32:
        # With more rows, or fewer warps, it spills a few registers.
        block_t, num_warps = 64, 8
    # Shorter steps, and more of them in flight, for the same number of bytes.
    num_stages = max(num_stages, min(MAX_STAGES, num_stages * MAX_STEP // block_k))
    return Tile("plain", block_t, block_n, block_k, num_warps, num_stages)


@triton.jit(do_not_specialize=["T"])
def _int8_group_linear_kernel(
    x_ptr,
    weight_ptr,
    weight_scale_ptr,
    ops,
    y_ptr,
    T,
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    PER_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One tile of y: each step multiplies BLOCK_K columns of one group and scales their sum."""
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
    is_scaled = columns < N
    # 32 bits: a thread holds one offset for each of its many columns, and would spill with 64.
    scale_at = columns * tl.cdiv(K, GROUP_SIZE)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        scale = tl.load(weight_scale_ptr + scale_at + step // (GROUP_SIZE // BLOCK_K), mask=is_scaled, other=0.0)
        x = tl.load(x_ptrs, mask=is_token[:, None], other=0)
        weight = tl.load(weight_ptrs)
        part = tl.dot(x, tl.trans(weight), out_dtype=tl.int32)
        # Written as fma, so that all tiles and compilers round a row in the same way.
        acc = tl.fma(part.to(tl.float32), tl.expand_dims(scale, 0), acc)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    launch_dependents(DEPENDENT)
    finish_tile(acc, ops, y_ptr, tokens, tile_n * BLOCK_N, T, N, PER_ROW, False, False)
