"""Attention over the paged cache: prefill chunks in causal tiles, decodes split along their context.

A request with one query row always runs through the split kernels, one with more rows always through the tiles, and a
split's length follows from the request's own context. So a row's result does not depend on the rest of the step.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_attention import decode, runs_on_hopper
from kernels.decode_step import Operands, Requests
from kernels.dependent import HOPPER, await_inputs, launch_dependents, starts_early
from kernels.dequantize import as_floats, num_dequantized
from kernels.hopper.prefill import prefill_on_hopper, suits_prefill
from kernels.launching import MAX_PLANS, Plan, power_of_2
from kernels.paging import (
    REQUESTS,
    Layout,
    codes_of,
    first_key,
    fold_keys,
    load_blocks,
    lowest_top,
    owner_of,
    paged_layout,
    scale_of,
)
from kernels.quantize import quantized
from kernels.quantized import Quantized, ToInt8
from kernels.rope import rope_and_cache, rotation_of
from kernels.rows import Rows
from kernels.tiles import AttentionTile, current_gpu, decode_tile, prefill_tile

__all__ = ["paged_attention", "rotary_attention"]

BLACKWELL = 100
LOG2_E = math.log2(math.e)

MAX_TURNED = 8
"""Most requests of a decode step that the kernel of attention rotates. H200, a layer at context 512, with the kernel
that every GPU has: 79.9 us instead of 84.9 at one request, 85.8 for 86.3 at eight, 91.9 for 90.8 at 16."""

MAX_TURNED_ON_HOPPER = 64
"""The same for Hopper's own kernel, which reads earlier keys before the queries are there: 86.2 us instead of 89.3 at
16 requests, 92.1 for 95.4 at 32, 118.7 for 121.6 at 64."""

MIN_ROWS = 16
"""Fewest rows of a tile that a matrix instruction multiplies."""


def paged_attention(
    q: Tensor,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    is_decode: bool,
    scale: float,
    quantize: ToInt8 | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor | Quantized:
    """Attend causally over the paged cache, prefill chunks and decodes in one batch. See reference.paged_attention.

    A request may have no query row here; its context is then 0. Sums are float32; q k^T and p v multiply in q's dtype,
    p rounded to it, but p of decodes over int8 values on Hopper to float16. Where a row multiplies int8 codes, scales
    multiply q k^T after the product and p before.

    Raises:
        ValueError: H is not a multiple of G, block_size is not a power of two, a cache's heads are not contiguous, or
            H * D is above `quantize.MAX_ROW` and rows are to be quantized.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1; Flash-Decoding (Dao et al., 2023).
    """
    requests = Requests(block_tables, query_starts, context_lens)
    layout = paged_layout(q.shape[1], k_cache, v_cache, window, soft_cap)
    return _paged_attention(_operands(q, k_cache, v_cache, requests, scale, layout), is_decode, quantize)


def rotary_attention(
    qkv: Tensor,
    rows: Rows,
    cos_sin: Tensor,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    num_heads: int,
    scale: float,
    quantize: ToInt8 | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor | Quantized:
    """Rotate, write to the cache and attend. See reference.rotary_attention.

    A small decode step is one kernel, with the bits of the two ops, unless queries and keys are normed: the order of a
    norm's sum follows the layout of its kernel. Rows that read each other's keys take two kernels at least, since keys
    are sure to be there only when the kernel that writes them has ended.

    If rows are alone, the tables and all keys but the rows' own must have been written before the last kernel that is
    not launched dependently, as torch's are not: they are read while kernels since then may still run. A table that has
    to be copied first is read later.

    Raises:
        ValueError: as `rope_and_cache` and `paged_attention`.
    """
    where = rows.positions, rows.slots, cos_sin
    requests = Requests(rows.block_tables, rows.query_starts, rows.context_lens)
    layout = paged_layout(num_heads, k_cache, v_cache, window, soft_cap)
    step = _operands(qkv, k_cache, v_cache, requests, scale, layout)._replace(arrivals=rows.arrivals)
    may_turn = rows.is_alone and q_weight is None and rows.block_tables.is_contiguous()
    if may_turn and qkv.shape[0] <= (MAX_TURNED_ON_HOPPER if runs_on_hopper(step) else MAX_TURNED):
        rotation, turn = rotation_of(qkv, *where, codes_of(k_cache), num_heads, q_weight, k_weight, sink)
        step = step._replace(rotation=rotation, turn=turn)
        return quantized(decode(step, _decode_tile(step)), quantize)
    q = rope_and_cache(qkv, *where, k_cache, v_cache, num_heads, q_weight, k_weight, eps, sink)
    return _paged_attention(step._replace(q=q), rows.is_decode, quantize)


def _operands(
    q: Tensor,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    requests: Requests,
    scale: float,
    layout: Layout,
) -> Operands:
    return Operands(
        q.contiguous(),
        codes_of(k_cache),
        codes_of(v_cache),
        scale_of(k_cache),
        scale_of(v_cache),
        requests._replace(block_tables=requests.block_tables.contiguous()),
        scale * LOG2_E,
        layout,
    )


def _paged_attention(step: Operands, is_decode: bool, quantize: ToInt8 | None) -> Tensor | Quantized:
    """Attend with queries that are rotated, [T, H, D]."""
    if is_decode:
        y = decode(step, _decode_tile(step))
    else:
        T, H, D = step.q.shape
        y = torch.empty((T, H * D), dtype=step.q.dtype, device=step.q.device)
        _prefill(step, _prefill_tile(step), y)
        decode(step, _decode_tile(step), y)
    return quantized(y, quantize)


def _decode_tile(step: Operands) -> AttentionTile:
    return decode_tile(current_gpu(step.q.device), step.layout.BLOCK_D, step.q.element_size(), step.k.element_size())


def _prefill_tile(step: Operands) -> AttentionTile:
    """The tile of a step; half as large if int8 codes and a window's mask would spill. Only Hopper holds both."""
    gpu, layout = current_gpu(step.q.device), step.layout
    tile = prefill_tile(gpu, layout.BLOCK_D, step.q.element_size(), step.k.element_size())
    is_crowded = step.k_scale is not None and (layout.WINDOW is not None or layout.SOFT_CAP is not None)
    if not is_crowded or gpu.capability == HOPPER or tile.block_m == MIN_ROWS:
        return tile
    return tile._replace(block_m=tile.block_m // 2, num_warps=tile.num_warps // 2)


def _prefill(step: Operands, tile: AttentionTile, y: Tensor) -> None:
    """Launches the tiles of every request with more than one query row.

    Which requests of a large step over an int8 cache read floats is found on the device: there is a launch for those,
    and one for the others.
    """
    has_codes = step.k_scale is not None and step.v_scale is not None
    num_keys = num_dequantized(y.shape[0], step.layout.BLOCK_SIZE) if has_codes else 0
    places = None
    if num_keys:
        floats, places = as_floats(step, num_keys, tile.block_n)
        # Where warps share rows, or a matrix unit of its own holds them, another tile adds up in another order.
        has_other_sums = tile.block_m < MIN_ROWS * tile.num_warps or current_gpu(y.device).capability == BLACKWELL
        _launch_tiles(floats, tile if has_other_sums else _prefill_tile(floats), y, True, places)
    _launch_tiles(step, tile, y, False, places)


def _launch_tiles(step: Operands, tile: AttentionTile, y: Tensor, is_dequantized: bool, places: Tensor | None) -> None:
    """The grid follows from the operands' shapes alone, so that a captured launch fits any step of these shapes.

    Hopper's own kernel has the bits of the other one, but never starts early, as kernels of small steps do.
    """
    T, (num_requests, max_blocks) = y.shape[0], step.requests.block_tables.shape
    is_early = starts_early(y.device, T)
    if not is_early and current_gpu(y.device).capability == HOPPER and suits_prefill(step):
        prefill_on_hopper(step, y, is_dequantized, places)
        return
    block_m = max(tile.block_m, power_of_2(step.layout.GROUP))
    grid = (T // (block_m // step.layout.GROUP) + num_requests, step.k.shape[2], 1)
    _plan(step.layout, tile, block_m, is_dequantized, is_early).launch(
        grid, step.q, step.k, step.v, step.k_scale, step.v_scale, places, y, *step.requests, num_requests,
        max_blocks, step.scale,
    )  # fmt: skip


@lru_cache(maxsize=MAX_PLANS)
def _plan(layout: Layout, tile: AttentionTile, block_m: int, is_dequantized: bool, is_early: bool) -> Plan:
    return Plan(
        _paged_attention_kernel, LAYOUT=layout, DEQUANTIZED=is_dequantized, BLOCK_M=block_m, BLOCK_N=tile.block_n,
        num_warps=tile.num_warps, num_stages=tile.num_stages, DEPENDENT=is_early, launch_pdl=is_early,
    )  # fmt: skip


@triton.jit
def _is_idle(places_ptr, num_requests, DEQUANTIZED: tl.constexpr):
    """Whether every prompt of the step is dequantized, and this launch is for the others."""
    is_idle = False
    if places_ptr is not None and not DEQUANTIZED:
        is_idle = tl.load(places_ptr + num_requests) == 0
    return is_idle


@triton.jit
def _row_offsets(tokens, heads, LAYOUT: tl.constexpr):
    """Distance in elements from the start of q or the output to heads of tokens, [BLOCK_M, BLOCK_D]."""
    rows = tokens.to(tl.int64) * (LAYOUT.GROUP * LAYOUT.G) + heads
    return rows[:, None] * LAYOUT.D + tl.arange(0, LAYOUT.BLOCK_D)[None, :]


@triton.jit
def _blocks_of(table_ptr, start, last, DEQUANTIZED: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """`load_blocks` of a request; dequantized keys follow each other."""
    if DEQUANTIZED:
        blocks = start // LAYOUT.BLOCK_SIZE
    else:
        blocks = load_blocks(table_ptr, start, last, LAYOUT.BLOCK_SIZE, BLOCK_N)
    return blocks


# The number of requests changes with every step; specialized on its value, three kernels would be compiled.
@triton.jit(do_not_specialize=["num_requests"])
def _paged_attention_kernel(q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, places_ptr, out_ptr, table_ptr,
                            query_starts_ptr, context_lens_ptr, num_requests, max_blocks, scale,
                            LAYOUT: tl.constexpr, DEQUANTIZED: tl.constexpr, BLOCK_M: tl.constexpr,
                            BLOCK_N: tl.constexpr, DEPENDENT: tl.constexpr):  # fmt: skip
    """One tile of queries of one request. The GROUP query heads of one key head share its rows.

    places: of the requests' first keys in `as_floats`, -1 for a request without; None where no request has any.
    DEQUANTIZED: the keys and values are those floats, and requests without are left out; else the requests with some.
    """
    await_inputs(DEPENDENT)
    GROUP: tl.constexpr = LAYOUT.GROUP
    BLOCK_D: tl.constexpr = LAYOUT.BLOCK_D
    WINDOW: tl.constexpr = LAYOUT.WINDOW
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    # The last tile of a request runs first: it sees the most keys.
    kv_head, tile = tl.program_id(1), tl.num_programs(0) - 1 - tl.program_id(0)
    if _is_idle(places_ptr, num_requests, DEQUANTIZED):
        return
    request = owner_of(tl.arange(0, REQUESTS), tile, query_starts_ptr, num_requests, QUERIES)
    query_start = tl.load(query_starts_ptr + request)
    num_queries = tl.load(query_starts_ptr + request + 1) - query_start
    first_query = (tile - query_start // QUERIES - request) * QUERIES
    if (num_queries < 2) | (first_query >= num_queries):
        return
    if places_ptr is not None:
        place = tl.load(places_ptr + request).to(tl.int64)
        if (place >= 0) != DEQUANTIZED:
            return
        if DEQUANTIZED:
            k_ptr += place * LAYOUT.K.SLOT
            v_ptr += place * LAYOUT.V.SLOT
    context = tl.load(context_lens_ptr + request)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    queries = first_query + rows // GROUP
    at = _row_offsets(query_start + queries, kv_head * GROUP + rows % GROUP, LAYOUT)
    mask = ((queries < num_queries) & (rows < QUERIES * GROUP))[:, None] & (columns < LAYOUT.D)[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)

    top, total = tl.full([BLOCK_M], lowest_top(WINDOW), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_ptr += kv_head * LAYOUT.K.HEAD
    v_ptr += kv_head * LAYOUT.V.HEAD
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head * LAYOUT.K_SCALE.HEAD
    if v_scale_ptr is not None:
        v_scale_ptr += kv_head * LAYOUT.V_SCALE.HEAD
    table_ptr += request.to(tl.int64) * max_blocks
    num_visible, first_visible = context - num_queries + queries + 1, context - num_queries + first_query + 1
    last = tl.minimum(context, first_visible + QUERIES - 1)
    first = first_key(first_visible, WINDOW, BLOCK_N)
    # Keys that every query sees need no mask. With a window later rows do not see them, so every tile is masked.
    middle = first_visible // BLOCK_N * BLOCK_N if WINDOW is None else first
    blocks = _blocks_of(table_ptr, first, last, DEQUANTIZED, LAYOUT, BLOCK_N)
    if WINDOW is None:
        for start in range(first, middle, BLOCK_N):
            next_blocks = _blocks_of(table_ptr, start + BLOCK_N, last, DEQUANTIZED, LAYOUT, BLOCK_N)
            top, total, acc = fold_keys(q, top, total, acc, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, blocks, start,
                                        last, middle, num_visible, scale, False, not DEQUANTIZED,
                                        q_ptr.dtype.element_ty, LAYOUT, BLOCK_N)  # fmt: skip
            blocks = next_blocks
    for start in range(middle, last, BLOCK_N):
        next_blocks = _blocks_of(table_ptr, start + BLOCK_N, last, DEQUANTIZED, LAYOUT, BLOCK_N)
        top, total, acc = fold_keys(q, top, total, acc, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, blocks, start, last,
                                    middle, num_visible, scale, True, not DEQUANTIZED,
                                    q_ptr.dtype.element_ty, LAYOUT, BLOCK_N)  # fmt: skip
        blocks = next_blocks
    launch_dependents(DEPENDENT)
    y = acc / tl.maximum(total, 1.0)[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
