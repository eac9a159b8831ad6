"""Attention of decodes on Hopper, in Gluon: each warp attends to keys of its own.

A program takes splits of one request's context for the query heads of one key head. Each of its warps has its own tiles
of keys, maximum, sum and weighted values, which meet at the end alone. Until then warps share no numbers; for each tile
there is a barrier behind the wait for its copy, and one before its memory is filled again.
The second product is y^T = v^T p^T. Its second operand is p as the first product leaves it in the registers, and heads
are padded to 8 there instead of 16.

A program that has all splits of a request adds them up itself. Otherwise the last of the request's programs does, in
the same order and with the same operations, so the bits are the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language import debug_barrier

from kernels.decode_step import Operands, is_last, write_new_key
from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.hopper.folding import fold_tile, fold_values, upper
from kernels.hopper.rings import FLOAT_KEYS, blocks_of, copy_first_tiles, copy_tiles, heads_of, rings_of
from kernels.hopper.warps import (
    BY_WARP,
    HEADS,
    MMA,
    ROWS,
    WARPS,
    add,
    each,
    nothing,
    store_heads,
    store_part,
    sum_of_parts,
)
from kernels.launching import MAX_PLANS, Plan, cdiv, power_of_2
from kernels.paging import Layout, query_codes
from kernels.rope import Turn, turned_heads

__all__ = ["decode_on_hopper", "suits_hopper"]

HEAD_SIZES = frozenset({64, 128})
MAX_GROUP, MIN_BLOCK = HEADS.value, FLOAT_KEYS.value
MAX_SPLITS = 16
SPLIT_LEN = 256
"""Fewest keys of a split. H200, of 128, 256 and 512: one request of 1024 keys takes 8.9, 8.9 and 10.2 us, four of 2048
take 17.2, 16.2 and 15.0, 256 of 512 the same."""

ENOUGH_PROGRAMS = 256
"""Where the key heads of all requests are as many, two for each multiprocessor, a program takes all splits of one."""

STAGES = 3
"""Tiles of each warp in shared memory. Two let three programs run on a multiprocessor: H200, over an int8 cache, 256
requests of 512 keys take 76.1 instead of 77.8 us, but 32 of 8192 take 164 instead of 135."""


class WarpParts(NamedTuple):
    """What the programs of a request leave for its last one; None where each has a whole request.

    y: float32 [B, splits, WARPS, G, D, GROUP], the weighted sum of each warp's values.   arrivals: int32 [B, G], zeros.
    sums: float32 [B, splits, WARPS, H, 2], log2 of the largest weight, and the sum of weights over it.
    """

    y: Tensor | None
    sums: Tensor | None
    arrivals: Tensor | None


def suits_hopper(step: Operands) -> bool:
    """Whether this kernel attends for a model on Hopper; it does then for all of its decodes."""
    layout = step.layout
    has_one_dtype = (step.k_scale is None) == (step.v_scale is None) and step.k.dtype == step.v.dtype
    has_dtype = step.q.element_size() == 2 and (step.k_scale is not None or step.k.dtype == step.q.dtype)
    is_plain = layout.WINDOW is None and layout.SOFT_CAP is None
    has_shape = layout.D in HEAD_SIZES and layout.GROUP <= MAX_GROUP and layout.BLOCK_SIZE >= MIN_BLOCK
    return has_one_dtype and has_dtype and is_plain and has_shape and _is_aligned(step)


def _is_aligned(step: Operands) -> bool:
    """Whether all heads of the caches have the 16 bytes' alignment of an asynchronous copy."""
    size, places = step.k.element_size(), step.k.data_ptr() | step.v.data_ptr()
    for strides in (step.layout.K, step.layout.V):
        places |= size * (strides.BLOCK | strides.SLOT | strides.HEAD)
    return places % 16 == 0


def decode_on_hopper(step: Operands, y: Tensor) -> None:
    """Attend for every request with one query row; other rows of y [T, H * D] are not written."""
    (B, max_blocks), layout = step.requests.block_tables.shape, step.layout
    num_splits = min(MAX_SPLITS, power_of_2(max(1, cdiv(max_blocks * layout.BLOCK_SIZE, SPLIT_LEN))))
    per_program = max(1, min(num_splits, num_splits * layout.G * B // ENOUGH_PROGRAMS))
    parts = WarpParts(None, None, None) if per_program == num_splits else _parts(step, num_splits)
    is_early = starts_early(step.q.device, B)
    _plan(layout, step.turn, num_splits, is_early).launch(
        (cdiv(num_splits, per_program), layout.G, B), step.q, step.k, step.v, step.k_scale, step.v_scale, step.rotation,
        parts, y, step.requests, max_blocks, step.scale, per_program,
    )  # fmt: skip


def _parts(step: Operands, num_splits: int) -> WarpParts:
    """Room for the splits; zeroed memory to count in is allocated if it is not given."""
    (B, _), layout, device = step.requests.block_tables.shape, step.layout, step.q.device
    H, arrivals = layout.GROUP * layout.G, step.arrivals
    if arrivals is None:
        arrivals = torch.zeros((B, layout.G), dtype=torch.int32, device=device)
    y = torch.empty((B, num_splits, WARPS.value, layout.G, layout.D, layout.GROUP), dtype=torch.float32, device=device)
    return WarpParts(y, torch.empty((B, num_splits, WARPS.value, H, 2), dtype=torch.float32, device=device), arrivals)


@lru_cache(maxsize=MAX_PLANS)
def _plan(layout: Layout, turn: Turn | None, num_splits: int, is_early: bool) -> Plan:
    return Plan(
        _decode_on_hopper_kernel, LAYOUT=layout, TURN=turn, SPLITS=num_splits, MIN_KEYS=SPLIT_LEN, STAGES=STAGES,
        DEPENDENT=is_early, launch_pdl=is_early, num_warps=WARPS.value,
    )  # fmt: skip


@gluon.jit
def _queries(q_ptr, rotation, token, kv_head, scale, k_ring, BY_ROW: gl.constexpr, LAYOUT: gl.constexpr,
             TURN: gl.constexpr):  # fmt: skip
    """The query heads of a key head as the first operand [WARPS, ROWS, D], codes over int8 keys; the scores' scales."""
    D: gl.constexpr = LAYOUT.D
    H: gl.constexpr = LAYOUT.GROUP * LAYOUT.G
    layout: gl.constexpr = gl.BlockedLayout([1, D // 8], [4, 8], [WARPS, 1], [1, 0])
    rows, columns = gl.arange(0, ROWS, gl.SliceLayout(1, layout)), gl.arange(0, D, gl.SliceLayout(0, layout))
    heads, is_head = kv_head * LAYOUT.GROUP + rows, rows < LAYOUT.GROUP
    if TURN is None:
        q = gl.load(q_ptr + token * H * D + heads[:, None] * D + columns[None, :], mask=is_head[:, None], other=0.0)
    else:
        stride: gl.constexpr = (H + 2 * LAYOUT.G) * D
        y = turned_heads(q_ptr, rotation, token, heads, columns, is_head, stride, 0.0, LAYOUT, TURN)
        q = y.to(q_ptr.dtype.element_ty)
    row_scale = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout)) + scale
    if LAYOUT.K_SCALE is not None:
        q, row_scale = query_codes(q, scale, True)
    scales = gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]), row_scale)
    # Every warp reads the operand from a tile of its own: that of the last stage, which is not in use yet.
    VEC: gl.constexpr = 128 // q.dtype.primitive_bitwidth
    by_warp: gl.constexpr = gl.BlockedLayout([1, 1, VEC], [1, 32 * VEC // D, D // VEC], [WARPS, 1, 1], [2, 1, 0])
    one = gl.convert_layout(q, gl.SliceLayout(0, by_warp))
    tile = k_ring.index(k_ring.shape[0] - 1).slice(0, ROWS, 1)
    tile.store(each(one, (0,)) + gl.zeros([WARPS, ROWS, D], q.dtype, by_warp))
    parts = gl.reshape(
        tile.load(gl.DotOperandLayout(0, MMA, 32 // q.dtype.primitive_bitwidth)), [WARPS, ROWS, 2, D // 2]
    )
    return gl.split(gl.permute(parts, (0, 1, 3, 2))), each(scales.slice(0, HEADS).load(gl.SliceLayout(0, BY_ROW)), (0,))


@gluon.jit
def _attend(q, row_scale, rings, caches, parts, first_split, table_ptr, kv_head, first, last, split_len, is_whole,
            LAYOUT: gl.constexpr, TYPE: gl.constexpr):  # fmt: skip
    """Attend to the keys first .. last - 1, which are whole splits. Returns their sum if it is all of the request.

    Otherwise writes each split to parts, from first_split on.
    """
    BY_ROW: gl.constexpr = row_scale.type.layout
    BLOCK_SIZE: gl.constexpr = LAYOUT.BLOCK_SIZE
    STAGES: gl.constexpr = rings[0].shape[0]
    N: gl.constexpr = rings[0].shape[2]
    C: gl.constexpr = LAYOUT.D // 2
    STEP: gl.constexpr = WARPS * N
    IS_INT8: gl.constexpr = LAYOUT.K_SCALE is not None
    keys = first + gl.arange(0, WARPS, BY_WARP) * N
    blocks = blocks_of(table_ptr, keys + (STAGES - 1) * STEP, last, BLOCK_SIZE)
    y_top, y_total, y_low, y_high = nothing(C, BY_ROW)
    top, total, low, high = nothing(C, BY_ROW)
    FIRST_UNIT: gl.constexpr = 2.0**-115 if IS_INT8 else 1.0
    unit = gl.full([WARPS], FIRST_UNIT, gl.float32, gl.SliceLayout(1, gl.SliceLayout(1, BY_ROW.parent)))
    stage = 0
    for start in range(first, last, STEP):
        async_copy.wait_group(STAGES - 2)
        debug_barrier()
        top, total, unit, shrink, p = fold_tile(
            q, row_scale, (top, total, unit), rings, stage, keys, last, start + STEP <= last, IS_INT8
        )
        v = rings[1].index(stage).permute((0, 2, 1)).load(gl.DotOperandLayout(0, MMA, 2))
        # The tile that was multiplied before this one makes room.
        keys += STEP
        copy_tiles(rings, (stage + STAGES - 1) % STAGES, caches, blocks, keys + (STAGES - 2) * STEP, last, LAYOUT)
        blocks = blocks_of(table_ptr, keys + (STAGES - 1) * STEP, last, BLOCK_SIZE)
        low, high = fold_values(p, shrink, v, low, high, IS_INT8, TYPE)
        stage = (stage + 1) % STAGES
        end = start + STEP
        if ((end - first) % split_len == 0) | (end >= last):
            if is_whole:
                y_top, y_total, y_low, y_high = add((y_top, y_total, y_low, y_high), (top, total, low, high), unit)
            elif parts.y is not None:
                split = first_split + (start - first) // split_len
                store_part((top, total, low, high), unit, parts, split, kv_head, LAYOUT)
            top, total, low, high = nothing(C, BY_ROW)
            unit = gl.full([WARPS], FIRST_UNIT, gl.float32, unit.type.layout)
    # The last copies are of nothing, but they write zeros to memory that is used again.
    async_copy.wait_group(0)
    return y_top, y_total, y_low, y_high


@gluon.jit
def _write_key(qkv_ptr, rotation, token, caches, kv_head, LAYOUT: gl.constexpr, TURN: gl.constexpr):
    """Write a token's key, turned, and its value, where the program's other threads will find them."""
    layout: gl.constexpr = gl.BlockedLayout([1, LAYOUT.D // 64], [1, 32], [2, 2], [1, 0])
    both = gl.arange(0, 2, gl.SliceLayout(1, layout))
    columns = gl.arange(0, LAYOUT.D, gl.SliceLayout(0, layout))
    write_new_key(qkv_ptr, rotation, token, caches, kv_head, both, columns, LAYOUT, TURN)


# The splits of a program change with the step; specialized on their number, three kernels would be compiled.
@gluon.jit(do_not_specialize=["per_program"])
def _decode_on_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    rotation,
    parts,
    out_ptr,
    requests,
    max_blocks,
    scale,
    per_program,
    LAYOUT: gl.constexpr,
    TURN: gl.constexpr,
    SPLITS: gl.constexpr,
    MIN_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """per_program splits of one request's context for the GROUP query heads of one key head.

    With TURN q_ptr holds queries, keys and values; the program that sees the last key writes it to the cache before.
    All other keys are of earlier steps then, as are the tables, so they are asked for before the queries are there.
    """
    launch_dependents(DEPENDENT)
    WAITS_LATER: gl.constexpr = DEPENDENT and TURN is not None
    await_inputs(DEPENDENT and not WAITS_LATER)
    G: gl.constexpr = LAYOUT.G
    H: gl.constexpr = LAYOUT.GROUP * G
    D: gl.constexpr = LAYOUT.D
    kv_head, request = gl.program_id(1), gl.program_id(2).to(gl.int64)
    token = gl.load(requests.query_starts + request).to(gl.int64)
    next_token = gl.load(requests.query_starts + request + 1)
    context = gl.load(requests.context_lens + request)
    if next_token - token != 1:
        await_inputs(WAITS_LATER)
        return
    rings = rings_of(k_ptr, v_ptr, STAGES, LAYOUT)
    N: gl.constexpr = rings[0].shape[2]
    STEP: gl.constexpr = WARPS * N
    split_len = gl.maximum(MIN_KEYS, gl.cdiv(gl.cdiv(context, SPLITS), STEP) * STEP)
    first = gl.program_id(0) * per_program * split_len
    if (first >= context) & (gl.program_id(0) > 0):
        await_inputs(WAITS_LATER)
        return
    last = gl.minimum(context, first + per_program * split_len)
    caches = heads_of(k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, kv_head, LAYOUT)
    table_ptr = requests.block_tables + request * max_blocks
    # Before all else, unless one of these tiles has the key that is still to be written. Loops of one turn or none, as
    # Triton 3.6 compiles no copy in an if.
    num_early = 1
    if TURN is not None:
        num_early = ((last < context) | (last - first > (STAGES - 1) * STEP)).to(gl.int32)
    for _ in range(num_early):
        copy_first_tiles(rings, caches, table_ptr, first, last, LAYOUT)
    await_inputs(WAITS_LATER)
    scores = upper(gl.zeros([WARPS, ROWS, N], gl.int32, MMA))
    BY_ROW: gl.constexpr = gl.SliceLayout(2, scores.type.layout)
    q, row_scale = _queries(q_ptr, rotation, token, kv_head, scale, rings[0], BY_ROW, LAYOUT, TURN)
    if TURN is not None:
        if last == context:
            _write_key(q_ptr, rotation, token, (k_ptr, v_ptr, k_scale_ptr, v_scale_ptr), kv_head, LAYOUT, TURN)
        for _ in range(1 - num_early):
            copy_first_tiles(rings, caches, table_ptr, first, last, LAYOUT)
    out_ptr += token * H * D
    of_request = request * SPLITS
    split = of_request + gl.program_id(0) * per_program
    is_whole = (first == 0) & (last == context)
    TYPE: gl.constexpr = out_ptr.dtype.element_ty if k_scale_ptr is None else gl.float16
    y = _attend(
        q, row_scale, rings, caches, parts, split, table_ptr, kv_head, first, last, split_len, is_whole, LAYOUT, TYPE
    )
    if is_whole:
        store_heads(y, out_ptr, kv_head, context, LAYOUT)
    elif parts.y is not None:
        num_splits = gl.cdiv(context, split_len)
        if is_last(parts.arrivals + request * G + kv_head, gl.cdiv(num_splits, per_program)):
            y = sum_of_parts(parts, of_request, num_splits, kv_head, BY_ROW, LAYOUT)
            store_heads(y, out_ptr, kv_head, context, LAYOUT)
