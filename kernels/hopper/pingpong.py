"""The int8 product of many tokens on Hopper, in Gluon (Triton's explicit dialect): two warp groups take turns.

One warp only issues the copies of the next operands. Two groups of four warps each compute every other tile of y: while
one multiplies, the other runs its epilogue, so the tensor cores never wait for one.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from kernels.epilogue import Epilogue, Form
from kernels.hopper.common import (
    LOADER_REGISTERS,
    MULTIPLIER_REGISTERS,
    launch_product,
    load_operands,
    store_tile,
    tile_start,
)
from kernels.tiles import Tile

__all__ = ["launch_pingpong"]


def launch_pingpong(
    x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor, tile: Tile, num_programs: int, form: Form
) -> None:
    """Fill y from x_q [T, K] and weight_q [N, K], with at most one program per multiprocessor."""
    launch_product(_int8_linear_pingpong_kernel, 1, x_q, weight_q, ops, y, tile, num_programs, form)


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
    """Every second tile of this program, from the WHO-th on."""
    x_ring, weight_ring, y_tiles = buffers
    full, empty, turns = barriers
    T, N, K, num_tiles = sizes
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    STAGES: gl.constexpr = x_ring.type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    y_tile = y_tiles.index(WHO)
    steps = gl.cdiv(K, x_desc.block_type.shape[1])
    step = WHO * steps
    turn = 0
    for index in range(gl.program_id(0) + WHO * gl.num_programs(0), num_tiles, 2 * gl.num_programs(0)):
        first_t, first_n = tile_start(index, T, N, BLOCK_T, BLOCK_N, GROUP)
        acc = gl.zeros([BLOCK_T, BLOCK_N], gl.int32, layout)
        # A stage's barrier distinguishes its uses by parity only, so no group may be more than one use ahead.
        mbarrier.wait(turns.index(WHO), turn & 1 ^ (1 - WHO))
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            weight = weight_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(x_ring.index(stage), weight, acc, is_async=True)
            # One product stays in flight; the one before it no longer needs its stage.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
            step += 1
        mbarrier.arrive(turns.index(1 - WHO), count=1)
        turn += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        step += steps
        store_tile(acc, ops, y_desc, y_tile, first_t, first_n, T, N, FORM)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def _int8_linear_pingpong_kernel(
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
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    weight_ring = gl.allocate_shared_memory(gl.int8, [STAGES] + weight_desc.block_type.shape, weight_desc.layout)
    y_tiles = gl.allocate_shared_memory(y_desc.dtype, [2] + y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for who in gl.static_range(2):
        mbarrier.init(turns.index(who), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    num_tiles = gl.cdiv(T, BLOCK_T) * gl.cdiv(N, BLOCK_N)
    FORM: gl.constexpr = (PER_ROW, PER_COLUMN, GATED)
    buffers, barriers, sizes = (x_ring, weight_ring, y_tiles), (full, empty, turns), (T, N, K, num_tiles)
    args = (x_desc, weight_desc, y_desc, ops, buffers, barriers, sizes, GROUP, FORM)
    gl.warp_specialize(
        [(_multiply_first, args), (_multiply_second, args), (load_operands, args)],
        [4, 1],
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )
