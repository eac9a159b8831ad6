"""The int8 product of few tokens on Hopper, in Gluon: weights are loaded while the kernel before still runs.

One warp only issues the copies of operands. It fills all its stages with weights, which no kernel writes, before it
waits for the kernel that writes x, and only then loads x. So memory is read without a pause between the kernels of a
step.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.epilogue import Epilogue, Form
from kernels.hopper.common import finish, first_token, piece_of
from kernels.launching import MAX_PLANS, Descriptor, Piece, Plan
from kernels.quantize import magnitude
from kernels.tiles import Tile

__all__ = ["launch_stream"]

LOADER_REGISTERS = gl.constexpr(24)
MAX_REGISTERS = {16: 128, 32: 128, 64: 128, 128: 168}
"""Registers per thread, by tokens of a tile: enough for the sums, and few enough to run several programs at once."""


def launch_stream(
    x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor, tile: Tile, num_tiles: int, form: Form
) -> None:
    """Fill y from x_q [T, K] and weight_q [N, K], one tile per program.

    weight_q must have been written before the last kernel was launched: it is read while that kernel may still run.
    """
    (T, K), N = x_q.shape, weight_q.shape[0]
    plan, x_piece, weight_piece = _plan(tile, form)
    x, weight = Descriptor(x_q, x_piece), Descriptor(weight_q, weight_piece)
    plan.launch((num_tiles, 1, 1), x, weight, ops, y, T, N, K)


@lru_cache(maxsize=MAX_PLANS)
def _plan(tile: Tile, form: Form) -> tuple[Plan, Piece, Piece]:
    """The plan, and the pieces of x and weight."""
    plan = Plan(
        _int8_linear_stream_kernel, **form._asdict(), STAGES=tile.num_stages, num_warps=tile.num_warps,
        maxnreg=MAX_REGISTERS[tile.block_t], launch_pdl=True,
    )  # fmt: skip
    return plan, piece_of(tile.block_t, tile.block_k, torch.int8), piece_of(tile.block_n, tile.block_k, torch.int8)


@gluon.jit
def _ask_for(step, desc, row, full, ring):
    stage = step % ring.type.shape[0]
    at = [row, step * desc.block_type.shape[1]]
    tma.async_copy_global_to_shared(desc, at, full.index(stage), ring.index(stage))


@gluon.jit
def _load_operands(x_desc, weight_desc, ops, y_ptr, rings, barriers, first_t, first_n, sizes, FORM: gl.constexpr):
    """Fill all stages, then refill each when it is free."""
    x_ring, weight_ring = rings
    full, empty = barriers
    STAGES: gl.constexpr = x_ring.type.shape[0]
    STAGE_BYTES: gl.constexpr = x_desc.block_type.nbytes + weight_desc.block_type.nbytes
    steps = gl.cdiv(sizes[2], x_desc.block_type.shape[1])
    at_once = gl.minimum(STAGES, steps)
    for step in range(at_once):
        mbarrier.expect(full.index(step), STAGE_BYTES)
        _ask_for(step, weight_desc, first_n, full, weight_ring)
    # The next kernel may start: if it streams too, it loads its weights with the memory bandwidth that is left.
    gdc_launch_dependents()
    gdc_wait()
    for step in range(at_once):
        _ask_for(step, x_desc, first_t, full, x_ring)
    for step in range(STAGES, steps):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), STAGE_BYTES)
        _ask_for(step, weight_desc, first_n, full, weight_ring)
        _ask_for(step, x_desc, first_t, full, x_ring)


@gluon.jit
def _multiply(x_desc, weight_desc, ops, y_ptr, rings, barriers, first_t, first_n, sizes, FORM: gl.constexpr):
    """y^T = weight x^T, so that the weight's rows fill the instruction's 64; then the epilogue on y."""
    x_ring, weight_ring = rings
    full, empty = barriers
    T, N, K = sizes
    STAGES: gl.constexpr = x_ring.type.shape[0]
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    WARPS: gl.constexpr = BLOCK_N // 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_T, 32])
    acc = gl.zeros([BLOCK_N, BLOCK_T], gl.int32, layout)
    for step in range(gl.cdiv(K, x_desc.block_type.shape[1])):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        x = x_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(weight_ring.index(stage), x, acc, is_async=True)
        # One product stays in flight; the one before it no longer needs its stage.
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    # These threads must wait too: that the loading warp waited does not make the scales of x visible to them.
    gdc_wait()
    # Neighbouring columns are in one thread, which gates them, and a row's columns are contiguous for the store.
    by_row: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS, 1], [1, 0])
    y = finish(gl.convert_layout(gl.permute(acc, (1, 0)), by_row), ops, first_t, first_n, T, N, FORM)
    GATE: gl.constexpr = 2 if FORM[2] else 1
    _store(y, ops, y_ptr, first_t, first_n // GATE, T, N // GATE)


@gluon.jit
def _store(y, ops, y_ptr, first_t, first, T, N):
    """Store float32 y in y_ptr's dtype, and its rows' maxima if wanted; N is the width of y as stored."""
    layout: gl.constexpr = y.type.layout
    tokens = first_t + gl.arange(0, y.shape[0], gl.SliceLayout(1, layout))
    columns = first + gl.arange(0, y.shape[1], gl.SliceLayout(0, layout))
    mask = (tokens < T)[:, None] & (columns < N)[None, :]
    stored = y.to(y_ptr.dtype.element_ty)
    gl.store(y_ptr + tokens[:, None] * N + columns[None, :], stored, mask=mask)
    if ops.row_max is not None:
        # The maximum of the stored values, which are the ones that will be quantized.
        row_max = gl.max(gl.where(mask, magnitude(stored.to(gl.float32)), 0.0), axis=1)
        at = tokens * gl.cdiv(N, y.shape[1]) + first // y.shape[1]
        gl.store(ops.row_max + at, row_max, mask=(tokens < T) & (first < N))


@gluon.jit(do_not_specialize=["T"])
def _int8_linear_stream_kernel(
    x_desc,
    weight_desc,
    ops,
    y_ptr,
    T,
    N,
    K,
    PER_ROW: gl.constexpr,
    PER_COLUMN: gl.constexpr,
    GATED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One tile of y. Tiles that read the same weights are neighbours."""
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    weight_ring = gl.allocate_shared_memory(gl.int8, [STAGES] + weight_desc.block_type.shape, weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    num_t = gl.cdiv(T, BLOCK_T)
    first_t = first_token(gl.program_id(0) % num_t, T, BLOCK_T)
    first_n = gl.program_id(0) // num_t * BLOCK_N
    FORM: gl.constexpr = (PER_ROW, PER_COLUMN, GATED)
    args = (x_desc, weight_desc, ops, y_ptr, (x_ring, weight_ring), (full, empty), first_t, first_n, (T, N, K), FORM)
    gl.warp_specialize([(_multiply, args), (_load_operands, args)], [1], [LOADER_REGISTERS])
