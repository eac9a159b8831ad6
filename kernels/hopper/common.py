"""What the kernels in Gluon share: pieces for Hopper's copy engine, registers; and of int8 products the launch, the
order of tiles, and the epilogue.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language import swizzle2d

from kernels.epilogue import MAX_PIECE, Epilogue, Form, dequantize, gate_pairs
from kernels.launching import MAX_PLANS, Descriptor, Piece, Plan
from kernels.quantize import magnitude
from kernels.tiles import Tile

__all__ = [
    "LOADER_REGISTERS", "MAX_REGISTERS", "MULTIPLIER_REGISTERS", "WARP_GROUP",
    "can_copy", "finish", "first_token", "launch_product", "load_operands", "piece_of", "store_tile", "tile_start",
]  # fmt: skip

WARP_GROUP = 4
LOADER_REGISTERS, MULTIPLIER_REGISTERS = gl.constexpr(40), gl.constexpr(232)
MAX_REGISTERS = 168
"""Registers per thread at launch: 12 warps share the 65,536 registers of a multiprocessor. Of them the warps that only
load give some to the two groups that multiply."""

GL_TYPES = {torch.int8: gl.int8, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def can_copy(x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor) -> bool:
    """Whether these kernels support this epilogue, and every row has the copy engine's alignment of 16 bytes."""
    has_scales = ops.weight_scale is not None and ops.residual is None
    places = x_q.shape[1] | 2 * y.shape[1] | x_q.data_ptr() | weight_q.data_ptr()
    return has_scales and y.dtype in GL_TYPES and places % 16 == 0


@lru_cache(maxsize=MAX_PLANS)
def piece_of(rows: int, columns: int, dtype: torch.dtype) -> Piece:
    """What the copy engine moves at once of a tensor of this dtype; one object for equal arguments."""
    return Piece((rows, columns), dtype, gl.NVMMASharedLayout.get_default_for([rows, columns], GL_TYPES[dtype]))


def launch_product(
    kernel: Any, groups: int, x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor, tile: Tile, num_programs: int,
    form: Form,
) -> None:  # fmt: skip
    """Fill y from x_q [T, K] and weight_q [N, K].

    kernel: it loads by one warp and multiplies by two groups.   groups: of them, how many share the tokens of a tile.
    """
    (T, K), N = x_q.shape, weight_q.shape[0]
    plan, x_piece, weight_piece, y_piece = _plan(kernel, groups, tile, form, y.dtype)
    x, weight, out = Descriptor(x_q, x_piece), Descriptor(weight_q, weight_piece), Descriptor(y, y_piece)
    plan.launch((num_programs, 1, 1), x, weight, out, ops, T, N, K)


@lru_cache(maxsize=MAX_PLANS)
def _plan(kernel: Any, groups: int, tile: Tile, form: Form, out_dtype: torch.dtype) -> tuple[Plan, Piece, Piece, Piece]:
    """The plan, and the pieces of x, weight and y."""
    plan = Plan(
        kernel, **form._asdict(), GROUP=tile.group, STAGES=tile.num_stages, num_warps=WARP_GROUP, maxnreg=MAX_REGISTERS
    )
    rows, columns = tile.block_t // groups, min(tile.block_n, MAX_PIECE.value)
    return (
        plan,
        piece_of(rows, tile.block_k, torch.int8),
        piece_of(tile.block_n, tile.block_k, torch.int8),
        piece_of(rows, columns // 2 if form.GATED else columns, out_dtype),
    )


@gluon.jit
def first_token(tile_t, T, BLOCK_T: gl.constexpr):
    """Where a tile starts. The last one ends with the last token and overlaps the tile before it.

    So the copy engine fills no rows with zeros: with such rows 65 tokens took 16.8 us and 128 tokens 13.7.
    """
    return gl.maximum(gl.minimum(tile_t * BLOCK_T, T - BLOCK_T), 0)


@gluon.jit
def finish(acc, ops, first_t, first_n, T, N, FORM: gl.constexpr):
    """The epilogue on an accumulator in registers: y as float32, before it is rounded."""
    layout: gl.constexpr = acc.type.layout
    tokens = first_t + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    columns = first_n + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    y = dequantize(acc, ops, tokens, columns, T, N, FORM[0], FORM[1])
    return gate_pairs(y) if FORM[2] else y


@gluon.jit
def tile_start(index, T, N, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """First token and first column of the index-th tile: column by column within groups of GROUP token tiles."""
    num_n = gl.cdiv(N, BLOCK_N)
    tile_t, tile_n = swizzle2d(index // num_n, index % num_n, gl.cdiv(T, BLOCK_T), num_n, GROUP)
    return first_token(tile_t, T, BLOCK_T), tile_n * BLOCK_N


@gluon.jit
def store_tile(acc, ops, y_desc, y_tile, first_t, first_n, T, N, FORM: gl.constexpr):
    """Finish an accumulator and have the copy engine store y, by way of y_tile in shared memory."""
    layout: gl.constexpr = acc.type.layout
    BLOCK_N: gl.constexpr = acc.shape[1]
    y = finish(acc, ops, first_t, first_n, T, N, FORM)
    y = y.to(y_desc.dtype)
    # The store before has to be read from y_tile: that of another tile long ago, or of this tile's piece before.
    tma.store_wait(0)
    y_tile.store(y)
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [first_t, first_n // BLOCK_N * y_desc.block_type.shape[1]], y_tile)
    if ops.row_max is not None:
        # The maximum of the stored values, which are the ones that will be quantized.
        row_max = gl.convert_layout(gl.max(magnitude(y.to(gl.float32)), axis=1), gl.SliceLayout(1, layout))
        tokens = first_t + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
        at = tokens.to(gl.int64) * gl.cdiv(N, BLOCK_N) + first_n // BLOCK_N
        gl.store(ops.row_max + at, row_max, mask=(tokens < T) & (first_n < N))


@gluon.jit
def load_operands(x_desc, weight_desc, y_desc, ops, buffers, barriers, sizes, GROUP: gl.constexpr, FORM: gl.constexpr):
    """Keep the ring of stages full, tile after tile; a stage has one piece of x for each group that shares a tile.

    barriers: of full stages, of empty ones, and others.
    """
    x_ring, weight_ring, _ = buffers
    full, empty = barriers[0], barriers[1]
    T, N, K, num_tiles = sizes
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    STAGES: gl.constexpr = weight_ring.type.shape[0]
    GROUPS: gl.constexpr = x_ring.type.shape[0] // STAGES
    step = 0
    for index in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_t, first_n = tile_start(index, T, N, GROUPS * ROWS, BLOCK_N, GROUP)
        for start in range(0, K, x_desc.block_type.shape[1]):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, GROUPS * x_desc.block_type.nbytes + weight_desc.block_type.nbytes)
            for who in gl.static_range(GROUPS):
                rows = x_ring.index(stage * GROUPS + who)
                tma.async_copy_global_to_shared(x_desc, [first_t + who * ROWS, start], ready, rows)
            tma.async_copy_global_to_shared(weight_desc, [first_n, start], ready, weight_ring.index(stage))
            step += 1
