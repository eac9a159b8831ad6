"""The int8 product of many tokens on Hopper, in Gluon, for deep products: two warp groups share a tile of weights.

One warp only issues the copies of the next operands. Two groups of four warps each compute half of the tokens of every
tile, which is twice as wide as one of the ping-pong kernel: a tile of 128 x 256 takes three quarters of the bytes
from the L2 cache for each product, and where the card's power is the limit, what bytes do not take is clock. Its
epilogues leave the tensor cores idle, so a product gains that is deep, or has no gate.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from kernels.epilogue import MAX_PIECE, Epilogue, Form
from kernels.hopper.common import (
    LOADER_REGISTERS,
    MULTIPLIER_REGISTERS,
    launch_product,
    load_operands,
    store_tile,
    tile_start,
)
from kernels.tiles import Tile

__all__ = ["launch_cooperative"]

GROUPS = gl.constexpr(2)
"""Warp groups that multiply, each for its part of the tokens of a tile."""


def launch_cooperative(
    x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor, tile: Tile, num_programs: int, form: Form
) -> None:
    """Fill y from x_q [T, K] and weight_q [N, K], with at most one program per multiprocessor."""
    launch_product(_int8_linear_cooperative_kernel, GROUPS.value, x_q, weight_q, ops, y, tile, num_programs, form)


@gluon.jit
def _multiply_first(
    x_desc, weight_desc, y_desc, ops, buffers, barriers, sizes, GROUP: gl.constexpr, FORM: gl.constexpr
):
    _multiply(0, x_desc, weight_desc, y_desc, ops, buffers, barriers, sizes, GROUP, FORM)


@gluon.jit
def _multiply_second(
    x_desc, weight_desc, y_desc, ops, buffers, barriers, sizes, GROUP: gl.constexpr, FORM: gl.constexpr
):
    _multiply(1, x_desc, weight_desc, y_desc, ops, buffers, barriers, sizes, GROUP, FORM)


@gluon.jit
def _multiply(
    WHO: gl.constexpr,
    x_desc,
    weight_desc,
    y_desc,
    ops,
    buffers,
    barriers,
    sizes,
    GROUP: gl.constexpr,
    FORM: gl.constexpr,
):
    """The WHO-th half of the tokens of every tile of this program."""
    x_ring, weight_ring, y_tiles = buffers
    full, empty = barriers
    T, N, K, num_tiles = sizes
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    STAGES: gl.constexpr = weight_ring.type.shape[0]
    # Triton knows no instruction of 256 columns for int8.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(BLOCK_N, MAX_PIECE), 32])
    y_tile = y_tiles.index(WHO)
    steps = gl.cdiv(K, x_desc.block_type.shape[1])
    step = 0
    for index in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_t, first_n = tile_start(index, T, N, GROUPS * ROWS, BLOCK_N, GROUP)
        acc = gl.zeros([ROWS, BLOCK_N], gl.int32, layout)
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            weight = weight_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(x_ring.index(stage * GROUPS + WHO), weight, acc, is_async=True)
            # One product stays in flight; the one before it no longer needs its stage.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        _store_pieces(acc, ops, y_desc, y_tile, first_t + WHO * ROWS, first_n, T, N, FORM)
    tma.store_wait(0)


@gluon.jit
def _store_pieces(acc, ops, y_desc, y_tile, first_t, first_n, T, N, FORM: gl.constexpr):
    """Finish and store an accumulator in pieces of at most `MAX_PIECE` columns, one after the other."""
    if acc.shape[1] > MAX_PIECE:
        HALF: gl.constexpr = acc.shape[1] // 2
        layout: gl.constexpr = acc.type.layout
        parts = gl.permute(gl.reshape(acc, [acc.shape[0], 2, HALF]), (0, 2, 1))
        left, right = gl.split(parts)
        left = gl.convert_layout(left, layout, assert_trivial=True)
        right = gl.convert_layout(right, layout, assert_trivial=True)
        _store_pieces(left, ops, y_desc, y_tile, first_t, first_n, T, N, FORM)
        _store_pieces(right, ops, y_desc, y_tile, first_t, first_n + HALF, T, N, FORM)
    else:
        store_tile(acc, ops, y_desc, y_tile, first_t, first_n, T, N, FORM)


@gluon.jit(do_not_specialize=["T"])
def _int8_linear_cooperative_kernel(
    x_desc,
    weight_desc,
    y_desc,
    ops,
    T,
    N,
    K,
    PER_ROW: gl.constexpr,
    PER_COLUMN: gl.constexpr,
    GATED: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Every num_programs-th tile of y."""
    BLOCK_T: gl.constexpr = GROUPS * x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(gl.int8, [GROUPS * STAGES] + x_desc.block_type.shape, x_desc.layout)
    weight_ring = gl.allocate_shared_memory(gl.int8, [STAGES] + weight_desc.block_type.shape, weight_desc.layout)
    y_tiles = gl.allocate_shared_memory(y_desc.dtype, [GROUPS] + y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    num_tiles = gl.cdiv(T, BLOCK_T) * gl.cdiv(N, BLOCK_N)
    FORM: gl.constexpr = (PER_ROW, PER_COLUMN, GATED)
    buffers, barriers, sizes = (x_ring, weight_ring, y_tiles), (full, empty), (T, N, K, num_tiles)
    args = (x_desc, weight_desc, y_desc, ops, buffers, barriers, sizes, GROUP, FORM)
    gl.warp_specialize(
        [(_multiply_first, args), (_multiply_second, args), (load_operands, args)],
        [4, 1],
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )
