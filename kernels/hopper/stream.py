"""The int8 product of few tokens on Hopper, in Gluon: weights are loaded while the kernel before still runs.

One warp only issues the copies of operands. It fills all its stages with weights, which no kernel writes, before it
waits for the kernel that writes x, and only then loads x. A program has as many tiles as make all programs resident at
once, and its next tile is loaded while this one is finished. So memory is read without a pause, between the kernels of
a step and within one.

The matrix instruction takes 64 rows. A tile of 32 columns fills them with the two halves of K: row 32 h + n is column n
of y over half h. It multiplies both halves of x, and of the four blocks of sums two are of one half: their sum is y. So
twice as many programs share the weights: 4096 columns are tiles of 64 for half of an H200 alone.
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
from kernels.hopper.common import WARP_GROUP, finish, first_token, piece_of
from kernels.launching import MAX_PLANS, Descriptor, Piece, Plan, cdiv
from kernels.quantize import magnitude
from kernels.tiles import Tile, current_gpu, halves_of

__all__ = ["launch_stream"]

LOADER_REGISTERS = gl.constexpr(24)
MAX_REGISTERS = {16: 128, 32: 128, 64: 128, 128: 168}
"""Registers per thread, by columns of sums: enough for them, and few enough to run several programs at once."""

SHARED_BYTES = 227 * 1024
ALL_REGISTERS = 65536
"""What programs on one multiprocessor share."""


def launch_stream(
    x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor, tile: Tile, num_tiles: int, form: Form
) -> None:
    """Fill y from x_q [T, K] and weight_q [N, K].

    weight_q must have been written before the last kernel that was launched plainly: it is read while kernels that were
    launched since may still run.
    """
    (T, K), N = x_q.shape, weight_q.shape[0]
    plan, x_piece, weight_piece, per_sm = _plan(tile, form)
    x, weight = Descriptor(x_q, x_piece), Descriptor(weight_q, weight_piece)
    at_once = per_sm * current_gpu(y.device).num_sms
    plan.launch((cdiv(num_tiles, cdiv(num_tiles, at_once)), 1, 1), x, weight, ops, y, T, N, K)


@lru_cache(maxsize=MAX_PLANS)
def _plan(tile: Tile, form: Form) -> tuple[Plan, Piece, Piece, int]:
    """The plan, the pieces of x and weight, and how many programs one multiprocessor has room for."""
    halves = halves_of(tile.block_n)
    max_registers = MAX_REGISTERS[halves * tile.block_t]
    plan = Plan(
        _int8_linear_stream_kernel, **form._asdict(), STAGES=tile.num_stages, HALVES=halves, num_warps=tile.num_warps,
        maxnreg=max_registers, launch_pdl=True,
    )  # fmt: skip
    x, weight = (piece_of(rows, tile.block_k, torch.int8) for rows in (tile.block_t, tile.block_n))
    ring = tile.num_stages * halves * (tile.block_t + tile.block_n) * tile.block_k
    registers = 32 * (tile.num_warps + WARP_GROUP) * max_registers
    return plan, x, weight, max(1, min(SHARED_BYTES // ring, ALL_REGISTERS // registers))


@gluon.jit
def _tile_start(index, T, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr):
    """First token and first column of the index-th tile; tiles that read the same weights are neighbours."""
    num_t = gl.cdiv(T, BLOCK_T)
    return first_token(index % num_t, T, BLOCK_T), index // num_t * BLOCK_N


@gluon.jit
def _ask_for(desc, row, step, steps, full, ring, stage, HALVES: gl.constexpr):
    """Have a piece of each half of K copied to a stage."""
    for half in gl.static_range(HALVES):
        at = [row, (half * steps + step) * desc.block_type.shape[1]]
        tma.async_copy_global_to_shared(desc, at, full.index(stage), ring.index(stage * HALVES + half))


@gluon.jit
def _load_operands(x_desc, weight_desc, ops, y_ptr, rings, barriers, sizes, FORM: gl.constexpr):
    """Fill all stages, then refill each when it is free, tile after tile."""
    x_ring, weight_ring = rings
    full, empty = barriers
    T, _, K, num_tiles = sizes
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    STAGES: gl.constexpr = full.type.shape[0]
    HALVES: gl.constexpr = x_ring.type.shape[0] // STAGES
    STAGE_BYTES: gl.constexpr = HALVES * (x_desc.block_type.nbytes + weight_desc.block_type.nbytes)
    steps = gl.cdiv(K, HALVES * x_desc.block_type.shape[1])
    first_t, first_n = _tile_start(gl.program_id(0), T, BLOCK_T, BLOCK_N)
    at_once = gl.minimum(STAGES, steps)
    for step in range(at_once):
        mbarrier.expect(full.index(step), STAGE_BYTES)
        _ask_for(weight_desc, first_n, step, steps, full, weight_ring, step, HALVES)
    # The next kernel may start: if it streams too, it loads its weights with the memory bandwidth that is left.
    gdc_launch_dependents()
    gdc_wait()
    for step in range(at_once):
        _ask_for(x_desc, first_t, step, steps, full, x_ring, step, HALVES)
    asked = at_once
    for index in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_t, first_n = _tile_start(index, T, BLOCK_T, BLOCK_N)
        # The first tile's first steps are under way. A variable of the outer loop that is set to 0 here would stay.
        for step in range(gl.where(index == gl.program_id(0), at_once, 0), steps):
            stage = asked % STAGES
            mbarrier.wait(empty.index(stage), (asked // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), STAGE_BYTES)
            _ask_for(weight_desc, first_n, step, steps, full, weight_ring, stage, HALVES)
            _ask_for(x_desc, first_t, step, steps, full, x_ring, stage, HALVES)
            asked += 1


@gluon.jit
def _multiply(x_desc, weight_desc, ops, y_ptr, rings, barriers, sizes, FORM: gl.constexpr):
    """y^T = weight x^T, so that the weight's rows fill the instruction's 64; then the epilogue on y."""
    x_ring, weight_ring = rings
    full, empty = barriers
    T, N, K, num_tiles = sizes
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    STAGES: gl.constexpr = full.type.shape[0]
    HALVES: gl.constexpr = x_ring.type.shape[0] // STAGES
    X_ROWS: gl.constexpr = HALVES * BLOCK_T
    WEIGHT_ROWS: gl.constexpr = HALVES * BLOCK_N
    WARPS: gl.constexpr = WEIGHT_ROWS // 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, X_ROWS, 32])
    xs = x_ring._reinterpret(gl.int8, [STAGES, X_ROWS, BLOCK_K], x_desc.layout)
    weights = weight_ring._reinterpret(gl.int8, [STAGES, WEIGHT_ROWS, BLOCK_K], weight_desc.layout)
    steps = gl.cdiv(K, HALVES * BLOCK_K)
    taken = 0
    for index in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_t, first_n = _tile_start(index, T, BLOCK_T, BLOCK_N)
        acc = gl.zeros([WEIGHT_ROWS, X_ROWS], gl.int32, layout)
        for step in range(steps):
            stage = taken % STAGES
            mbarrier.wait(full.index(stage), taken // STAGES & 1)
            acc = warpgroup_mma(weights.index(stage), xs.index(stage).permute((1, 0)), acc, is_async=True)
            # One product stays in flight; the one before it no longer needs its stage.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((taken + STAGES - 1) % STAGES), count=1, pred=step > 0)
            taken += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((taken + STAGES - 1) % STAGES), count=1)
        # These threads must wait too: that the loading warp waited does not make the scales of x visible to them.
        gdc_wait()
        y = finish(_by_row(acc, BLOCK_T, BLOCK_N, WARPS), ops, first_t, first_n, T, N, FORM)
        GATE: gl.constexpr = 2 if FORM[2] else 1
        _store(y, ops, y_ptr, first_t, first_n // GATE, T, N // GATE)


@gluon.jit
def _by_row(acc, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr):
    """The sums [BLOCK_T, BLOCK_N], over all of K.

    Neighbouring columns are in one thread, which gates them, and a row's columns are contiguous for the store.
    """
    if acc.shape[0] == BLOCK_N:
        by_row: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS, 1], [1, 0])
        sums = gl.convert_layout(gl.permute(acc, (1, 0)), by_row)
    else:
        halves: gl.constexpr = gl.BlockedLayout([1, 2, 2, 2], [2, 16, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
        blocks = gl.permute(gl.reshape(acc, [2, BLOCK_N, 2, BLOCK_T]), (3, 1, 0, 2))
        first_of_x, second_of_x = gl.split(gl.convert_layout(blocks, halves))
        first, _ = gl.split(first_of_x)
        _, second = gl.split(second_of_x)
        sums = first + second
    return sums


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
    HALVES: gl.constexpr,
):
    """The tiles of y that are a program's. Tiles that read the same weights are neighbours."""
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(gl.int8, [HALVES * STAGES] + x_desc.block_type.shape, x_desc.layout)
    weight_ring = gl.allocate_shared_memory(
        gl.int8, [HALVES * STAGES] + weight_desc.block_type.shape, weight_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    FORM: gl.constexpr = (PER_ROW, PER_COLUMN, GATED)
    sizes = (T, N, K, gl.cdiv(T, BLOCK_T) * gl.cdiv(N, BLOCK_N))
    args = (x_desc, weight_desc, ops, y_ptr, (x_ring, weight_ring), (full, empty), sizes, FORM)
    gl.warp_specialize([(_multiply, args), (_load_operands, args)], [1], [LOADER_REGISTERS])
