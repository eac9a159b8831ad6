"""Attention of prompts on Hopper, in Gluon: one half of a program's rows can multiply while the other finds weights.

One warp only issues the copies of keys and values. Two groups of four warps each attend for half of the query rows, and
share the tiles of keys. A group has the scores of a tile and the weighted values of the one before multiplied at once,
and the tensor cores may work for the other group while it computes the tile's weights. Nothing makes the two take
turns: barriers for that cost 1 to 8 % (H200).

The operations on a row, and their order, are those of the kernel that every GPU has, and so are the bits.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.decode_step import Operands
from kernels.hopper.common import LOADER_REGISTERS, MAX_REGISTERS, MULTIPLIER_REGISTERS, WARP_GROUP, piece_of
from kernels.launching import MAX_PLANS, Descriptor, Plan
from kernels.paging import REQUESTS, Layout, owner_of

__all__ = ["prefill_on_hopper", "suits_prefill"]

HEAD_SIZES = frozenset({64, 128})
HALVES, ROWS = gl.constexpr(2), gl.constexpr(64)
"""Groups of warps that multiply, and query rows of each: as many as a matrix instruction takes."""

KEYS = gl.constexpr(64)
"""Keys of a tile: as many as the kernel that every GPU has, so that sums are added up in the same order."""

MAX_GROUP, MIN_BLOCK = ROWS.value, KEYS.value

STAGES = 2
"""Tiles of keys in shared memory, and of values. H200, 16 prompts of 2048 tokens: 1,209 us, with three 1,275."""


def suits_prefill(step: Operands) -> bool:
    """Whether this kernel attends for prompts over such a cache: floats in blocks of a tile or more, and no window."""
    layout = step.layout
    has_dtype = step.q.element_size() == 2 and step.q.dtype == step.k.dtype == step.v.dtype
    has_shape = layout.D in HEAD_SIZES and layout.GROUP <= MAX_GROUP and layout.BLOCK_SIZE >= MIN_BLOCK
    is_plain = layout.WINDOW is None and layout.SOFT_CAP is None
    is_one_matrix = step.k.is_contiguous() and step.v.is_contiguous()
    is_aligned = (step.k.data_ptr() | step.v.data_ptr()) % 16 == 0
    return has_dtype and has_shape and is_plain and is_one_matrix and is_aligned


def prefill_on_hopper(step: Operands, y: Tensor, is_dequantized: bool, places: Tensor | None) -> None:
    """Attend for every request with more than one query row; other rows of y [T, H * D] are not written.

    is_dequantized, places: those of `attention._paged_attention_kernel`.
    """
    layout, (num_requests, max_blocks) = step.layout, step.requests.block_tables.shape
    slot, piece = layout.G * layout.D, piece_of(KEYS.value, layout.D, step.q.dtype)
    k, v = (Descriptor(cache.view(-1, slot), piece) for cache in (step.k, step.v))
    queries = HALVES.value * ROWS.value // layout.GROUP
    # The grid follows from the operands' shapes alone, so that a captured launch fits any step of these shapes.
    grid = y.shape[0] // queries + num_requests, layout.G, 1
    _plan(layout, is_dequantized).launch(
        grid, step.q, k, v, places, y, *step.requests, num_requests, max_blocks, step.scale
    )


@lru_cache(maxsize=MAX_PLANS)
def _plan(layout: Layout, is_dequantized: bool) -> Plan:
    return Plan(
        _prefill_on_hopper_kernel, LAYOUT=layout, DEQUANTIZED=is_dequantized, STAGES=STAGES, num_warps=WARP_GROUP,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip


@gluon.jit
def _load_keys(k_desc, v_desc, rings, barriers, table_ptr, place, kv_head, last, LAYOUT: gl.constexpr,
               DEQUANTIZED: gl.constexpr):  # fmt: skip
    """Keep the rings full, with all tiles of keys below last."""
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_ring.shape[0]
    column = kv_head * LAYOUT.D
    block = 0
    if not DEQUANTIZED:
        block = gl.load(table_ptr)
    for start in range(0, last, KEYS):
        nth = start // KEYS
        stage, parity = nth % STAGES, (nth // STAGES & 1) ^ 1
        row = place + start
        if not DEQUANTIZED:
            row = block * LAYOUT.BLOCK_SIZE + start % LAYOUT.BLOCK_SIZE
            # A tile ahead of its use.
            later = start + KEYS
            block = gl.load(table_ptr + later // LAYOUT.BLOCK_SIZE, mask=later < last, other=0)
        mbarrier.wait(k_empty.index(stage), parity)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [row, column], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_empty.index(stage), parity)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [row, column], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def _attend_first(q_ptr, out_ptr, rings, barriers, sizes, scale, LAYOUT: gl.constexpr):
    _attend(0, q_ptr, out_ptr, rings, barriers, sizes, scale, LAYOUT)


@gluon.jit
def _attend_second(q_ptr, out_ptr, rings, barriers, sizes, scale, LAYOUT: gl.constexpr):
    _attend(1, q_ptr, out_ptr, rings, barriers, sizes, scale, LAYOUT)


@gluon.jit
def _attend(HALF: gl.constexpr, q_ptr, out_ptr, rings, barriers, sizes, scale, LAYOUT: gl.constexpr):
    """One half of the program's query rows."""
    k_ring, v_ring = rings
    k_full, k_empty, v_full, _ = barriers
    _, _, first_query, num_queries, context, last = sizes
    STAGES: gl.constexpr = k_ring.shape[0]
    D: gl.constexpr = LAYOUT.D
    BY_KEY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    BY_COLUMN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    at, mask = _places(HALF, sizes, LAYOUT)
    q = gl.convert_layout(gl.load(q_ptr + at, mask=mask, other=0.0), gl.DotOperandLayout(0, BY_KEY, 2))
    rows = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, BY_KEY))
    num_visible = context - num_queries + first_query + rows // LAYOUT.GROUP + 1
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, BY_KEY))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, BY_KEY))

    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=[_scores(q, k_ring.index(0), BY_KEY)])
    mbarrier.arrive(k_empty.index(0), count=1)
    top, total, _, p = _weights(scores, top, total, 0, num_visible, scale, True, q.dtype)
    state = p, gl.zeros([ROWS, D], gl.float32, BY_COLUMN), top, total
    num_tiles = gl.cdiv(last, KEYS)
    # Keys that every query sees need no mask.
    middle = gl.maximum((context - num_queries + first_query + 1) // KEYS, 1)
    for nth in range(1, middle):
        state = _fold(q, state, rings, barriers, nth, num_visible, scale, False)
    for nth in range(middle, num_tiles):
        state = _fold(q, state, rings, barriers, nth, num_visible, scale, True)
    p, acc, top, total = state
    stage = (num_tiles - 1) % STAGES
    mbarrier.wait(v_full.index(stage), (num_tiles - 1) // STAGES & 1)
    if last % KEYS != 0:
        _clear(v_ring.index(stage), last % KEYS)
    sums, weights = _weighted(p, v_ring.index(stage), acc)
    acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
    total = gl.convert_layout(total, gl.SliceLayout(1, BY_COLUMN), assert_trivial=True)
    y = (acc / gl.maximum(total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + at, gl.convert_layout(y, at.type.layout), mask=mask)


@gluon.jit
def _places(HALF: gl.constexpr, sizes, LAYOUT: gl.constexpr):
    """Where rows of a half are in q and the output, [ROWS, D] in elements, and which of them there are."""
    kv_head, query_start, first_query, num_queries, _, _ = sizes
    GROUP: gl.constexpr = LAYOUT.GROUP
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // LAYOUT.D, LAYOUT.D // 8], [4, 1], [1, 0])
    rows = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
    columns = gl.arange(0, LAYOUT.D, gl.SliceLayout(0, LINES))[None, :]
    queries = first_query + rows // GROUP
    heads = (query_start + queries).to(gl.int64) * (GROUP * LAYOUT.G) + kv_head * GROUP + rows % GROUP
    is_row = (queries < num_queries) & (rows < HALVES * ROWS // GROUP * GROUP)
    # The second condition, which always holds, gives the mask its columns.
    return heads[:, None] * LAYOUT.D + columns, is_row[:, None] & (columns >= 0)


@gluon.jit
def _scores(q, k, BY_KEY: gl.constexpr):
    """Issue q k^T."""
    none = gl.zeros([ROWS, KEYS], gl.float32, BY_KEY)
    return warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _weighted(p, v, acc):
    """Issue acc + p v. Returns it and its first operand, which has to stay in its registers until it is there."""
    weights = gl.convert_layout(p, gl.DotOperandLayout(0, acc.type.layout, 2), assert_trivial=True)
    return warpgroup_mma(weights, v, acc, is_async=True), weights


@gluon.jit
def _fold(q, state, rings, barriers, nth, num_visible, scale, MASKED: gl.constexpr):
    """Add the values of the tile before, and find the weights of the nth.

    state: the weights of the tile before, the sum of weighted values before it, the largest score, the sum of weights.
    """
    p, acc, top, total = state
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_ring.shape[0]
    BY_KEY: gl.constexpr = top.type.layout.parent
    stage, before = nth % STAGES, (nth - 1) % STAGES
    mbarrier.wait(k_full.index(stage), nth // STAGES & 1)
    scores = _scores(q, k_ring.index(stage), BY_KEY)
    mbarrier.wait(v_full.index(before), (nth - 1) // STAGES & 1)
    sums, weights = _weighted(p, v_ring.index(before), acc)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    top, total, shrink, p = _weights(scores, top, total, nth * KEYS, num_visible, scale, MASKED, p.dtype)
    acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc *= gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)[:, None]
    return p, acc, top, total


@gluon.jit
def _weights(scores, top, total, start, num_visible, scale, MASKED: gl.constexpr, TYPE: gl.constexpr):
    """Add keys start and up to the running maximum and sum. Returns both, what scales older sums, and the weights."""
    if MASKED:
        keys = start + gl.arange(0, KEYS, gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(keys[None, :] < num_visible[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, axis=1) * scale)
    p = gl.exp2(scores * scale - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return new_top, total * shrink + gl.sum(p, axis=1), shrink, p.to(TYPE)


@gluon.jit
def _clear(v, num_keys):
    """Write 0 to the values from num_keys on: a slot behind the context may hold NaN, and 0 times NaN is NaN.

    Both halves do so, each before it multiplies them, and write the other values as they are: the other half may read
    them meanwhile. No tile follows the last one, so none is copied into this memory any more.
    """
    D: gl.constexpr = v.shape[1]
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    is_key = gl.arange(0, KEYS, gl.SliceLayout(1, LINES)) < num_keys
    v.store(gl.where(is_key[:, None], v.load(LINES), 0.0))
    fence_async_shared()


@gluon.jit(do_not_specialize=["num_requests"])
def _prefill_on_hopper_kernel(q_ptr, k_desc, v_desc, places_ptr, out_ptr, table_ptr, query_starts_ptr,
                              context_lens_ptr, num_requests, max_blocks, scale, LAYOUT: gl.constexpr,
                              DEQUANTIZED: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """One tile of queries of one request. The GROUP query heads of one key head share its rows."""
    QUERIES: gl.constexpr = HALVES * ROWS // LAYOUT.GROUP
    # The last tile of a request runs first: it sees the most keys.
    kv_head, tile = gl.program_id(1), gl.num_programs(0) - 1 - gl.program_id(0)
    nth = gl.arange(0, REQUESTS, gl.BlockedLayout([REQUESTS // 128], [32], [4], [0]))
    request = owner_of(nth, tile, query_starts_ptr, num_requests, QUERIES)
    query_start = gl.load(query_starts_ptr + request)
    num_queries = gl.load(query_starts_ptr + request + 1) - query_start
    first_query = (tile - query_start // QUERIES - request) * QUERIES
    if (num_queries < 2) | (first_query >= num_queries):
        return
    place = 0
    if places_ptr is not None:
        place = gl.load(places_ptr + request)
        if (place >= 0) != DEQUANTIZED:
            return
    context = gl.load(context_lens_ptr + request)
    # At least one, or nothing would be loaded and the others would wait for ever. Rows without a key become NaN.
    last = gl.maximum(gl.minimum(context, context - num_queries + first_query + QUERIES), 1)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=HALVES)
        mbarrier.init(v_empty.index(stage), count=HALVES)
    rings, barriers = (k_ring, v_ring), (k_full, k_empty, v_full, v_empty)
    sizes = kv_head, query_start, first_query, num_queries, context, last
    table_ptr += request.to(gl.int64) * max_blocks
    # Not by way of a name: a Layout cannot be assigned to one.
    gl.warp_specialize(
        [
            (_attend_first, (q_ptr, out_ptr, rings, barriers, sizes, scale, LAYOUT)),
            (_attend_second, (q_ptr, out_ptr, rings, barriers, sizes, scale, LAYOUT)),
            (_load_keys, (k_desc, v_desc, rings, barriers, table_ptr, place, kv_head, last, LAYOUT, DEQUANTIZED)),
        ],
        [4, 1],
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )
