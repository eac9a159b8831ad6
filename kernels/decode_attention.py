"""Attention of requests with one query row: splits of the context and their sum, and their rotation where few decode.

A program attends to some splits of a request's context for the query heads of one key head. With few requests the last
program that finishes adds the splits up. The programs count themselves in `arrivals`, which a launch finds and leaves
at zero, so launches that may run at the same time need memory of their own. With many, a second kernel adds the splits
up: it is faster where programs wait for multiprocessors. Both give the same bits.

On Hopper most models' decodes are those of `kernels.hopper.decode`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_step import Operands, is_last, write_new_key
from kernels.dependent import HOPPER, await_inputs, launch_dependents, starts_early
from kernels.hopper.decode import decode_on_hopper, suits_hopper
from kernels.launching import MAX_PLANS, Plan, cdiv, power_of_2
from kernels.paging import LIFT, Layout, first_key, fold_keys, fold_pairs, load_blocks, lowest_top, query_codes
from kernels.rope import Turn, turned_heads
from kernels.tiles import AttentionTile, current_gpu

__all__ = ["decode", "runs_on_hopper"]

MAX_SPLITS = 16
MIN_SPLIT = 128
"""Fewest keys of a split. With one request, sixteen splits of 8 key heads fill a GPU."""

ENOUGH_PROGRAMS = 512
"""With more programs than this, each takes several splits of its request one after the other. H100, 32 requests at
context 512: 34 us; with 2048 instead it takes 37, with one split per program 43."""

MAX_JOINED = 64
"""Most requests of a step whose splits are added up by their last program. H200, a layer at context 512: 90.8 us
instead of 93.4 at 16 requests, 123.7 instead of 127.2 at 64, but 274 instead of 272 at 256, and 281 instead of 268 over
an int8 cache."""

SUM_HEADS = 4
"""Heads whose splits are added up at once."""

SUM_STAGES = tl.constexpr(5)

MIN_KEYS = tl.constexpr(MIN_SPLIT)
MOST_HEADS = tl.constexpr(SUM_HEADS)


class Parts(NamedTuple):
    """What the programs of a request leave for its sum; None where there is one split.

    y: float32 [B, splits, H, D].   lse: float32 [B, splits, H], log2 of the softmax sums.
    arrivals: int32 [B, G], or None if another kernel adds the splits up.
    """

    y: Tensor | None
    lse: Tensor | None
    arrivals: Tensor | None


def decode(step: Operands, tile: AttentionTile, y: Tensor | None = None) -> Tensor:
    """Attend for every request with one query row; other rows of y [T, H * D] are not written."""
    q, layout = step.q, step.layout
    (B, max_blocks), H, D = step.requests.block_tables.shape, layout.GROUP * layout.G, layout.D
    y = torch.empty((q.shape[0], H * D), dtype=q.dtype, device=q.device) if y is None else y
    if runs_on_hopper(step):
        decode_on_hopper(step, y)
        return y
    max_keys = max_blocks * layout.BLOCK_SIZE
    if layout.WINDOW is not None:
        max_keys = min(max_keys, layout.WINDOW + tile.block_n - 1)
    num_splits = min(MAX_SPLITS, power_of_2(max(1, cdiv(max_keys, MIN_SPLIT))))
    parts = _parts(step, num_splits)
    per_program = max(1, min(num_splits, num_splits * layout.G * B // ENOUGH_PROGRAMS))
    is_early = starts_early(q.device, B)
    _split_plan(layout, step.turn, tile, num_splits, is_early).launch(
        (cdiv(num_splits, per_program), layout.G, B), q, step.k, step.v, step.k_scale, step.v_scale, step.rotation,
        parts, y, step.requests, max_blocks, step.scale, per_program,
    )  # fmt: skip
    if num_splits > 1 and parts.arrivals is None:
        heads = min(SUM_HEADS, power_of_2(H))
        plan = _sum_plan(layout, tile.block_n, heads, num_splits, is_early)
        plan.launch((B, cdiv(H, heads), 1), parts.y, parts.lse, y, step.requests)
    return y


def runs_on_hopper(step: Operands) -> bool:
    """Whether Hopper's own kernel attends."""
    return current_gpu(step.q.device).capability == HOPPER and suits_hopper(step)


def _parts(step: Operands, num_splits: int) -> Parts:
    """Room for the splits; zeroed memory to count in is allocated if it is needed and not given."""
    (B, _), layout, device = step.requests.block_tables.shape, step.layout, step.q.device
    if num_splits == 1:
        return Parts(None, None, None)
    H, arrivals = layout.GROUP * layout.G, None
    if B <= MAX_JOINED:
        arrivals = step.arrivals
        if arrivals is None:
            arrivals = torch.zeros((B, layout.G), dtype=torch.int32, device=device)
    y = torch.empty((B, num_splits, H, layout.D), dtype=torch.float32, device=device)
    return Parts(y, torch.empty((B, num_splits, H), dtype=torch.float32, device=device), arrivals)


@lru_cache(maxsize=MAX_PLANS)
def _split_plan(layout: Layout, turn: Turn | None, tile: AttentionTile, num_splits: int, is_early: bool) -> Plan:
    return Plan(
        _paged_decode_kernel, LAYOUT=layout, TURN=turn, SPLITS=num_splits,
        PAIRS=tile.in_pairs and layout.V_SCALE is not None, INT8=tile.is_int8,
        BLOCK_M=max(16, power_of_2(layout.GROUP)), BLOCK_N=tile.block_n,
        num_warps=tile.num_warps, num_stages=tile.num_stages, DEPENDENT=is_early, launch_pdl=is_early,
    )  # fmt: skip


@lru_cache(maxsize=MAX_PLANS)
def _sum_plan(layout: Layout, block_n: int, heads: int, num_splits: int, is_early: bool) -> Plan:
    return Plan(
        _paged_decode_sum_kernel, LAYOUT=layout, HEADS=heads, BLOCK_N=block_n, SPLITS=num_splits,
        num_warps=max(1, heads * layout.BLOCK_D // 256), DEPENDENT=is_early, launch_pdl=is_early,
    )  # fmt: skip


@triton.jit
def _split_len(num_keys, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of one split of num_keys: whole tiles, the same for all splits of a request except the last."""
    return tl.maximum(MIN_KEYS, tl.cdiv(tl.cdiv(num_keys, SPLITS), BLOCK_N) * BLOCK_N)


@triton.jit
def _attend(q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, part_ptr, lse_ptr, table_ptr, kv_head, first, last, context,
            window_start, split_len, scale, LAYOUT: tl.constexpr, SPLITS: tl.constexpr, PAIRS: tl.constexpr,
            TYPE: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Attend with q [BLOCK_M, BLOCK_D], codes over int8 keys, to the keys first .. last - 1, which are whole splits.

    Writes each split's softmax times v and log2 of its sum. Returns the former of the last, for a request of one split.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    GROUP: tl.constexpr = LAYOUT.GROUP
    WINDOW: tl.constexpr = LAYOUT.WINDOW
    BLOCK_D: tl.constexpr = LAYOUT.BLOCK_D
    H: tl.constexpr = GROUP * LAYOUT.G
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, LAYOUT.BLOCK_D)
    heads = kv_head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (columns < LAYOUT.D)[None, :]
    top = tl.full([BLOCK_M], lowest_top(WINDOW), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # With PAIRS acc has the even columns.
    acc = tl.zeros([BLOCK_M, BLOCK_D // 2 if PAIRS else BLOCK_D], tl.float32)
    odd = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    k_ptr += kv_head * LAYOUT.K.HEAD
    v_ptr += kv_head * LAYOUT.V.HEAD
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head * LAYOUT.K_SCALE.HEAD
    if v_scale_ptr is not None:
        v_scale_ptr += kv_head * LAYOUT.V_SCALE.HEAD
    num_visible = tl.full([BLOCK_M], last if WINDOW is None else context, tl.int32)
    blocks = load_blocks(table_ptr, first, last, LAYOUT.BLOCK_SIZE, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        next_blocks = load_blocks(table_ptr, start + BLOCK_N, last, LAYOUT.BLOCK_SIZE, BLOCK_N)
        # A split starts from the lowest maximum, which also scales what the split before left to 0.
        top = tl.where((start - window_start) % split_len == 0, lowest_top(WINDOW), top)
        if PAIRS:
            top, total, acc, odd = fold_pairs(q, top, total, acc, odd, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, blocks,
                                              start, last, num_visible, scale, TYPE, LAYOUT, BLOCK_N)  # fmt: skip
        else:
            top, total, acc = fold_keys(q, top, total, acc, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, blocks, start, last,
                                        last, num_visible, scale, True, False, TYPE, LAYOUT, BLOCK_N)  # fmt: skip
        blocks = next_blocks
        if SPLITS > 1:
            end = start + BLOCK_N
            if ((end - window_start) % split_len == 0) | (end >= last):
                part = (start - window_start) // split_len * H + heads
                y = _columns_of(acc, odd, PAIRS) / (total if v_scale_ptr is None else total * LIFT)[:, None]
                tl.store(part_ptr + part[:, None] * LAYOUT.D + columns[None, :], y, mask=mask)
                tl.store(lse_ptr + part, top + tl.math.log2(total), mask=rows < GROUP)
    # The largest score adds 1 to total. Less than 1 means no key (context 0), and y is then 0.
    total = tl.maximum(total, 1.0)
    return _columns_of(acc, odd, PAIRS) / (total if v_scale_ptr is None else total * LIFT)[:, None]


@triton.jit
def _columns_of(acc, odd, PAIRS: tl.constexpr):
    """All columns in order."""
    return tl.reshape(tl.join(acc, odd), [acc.shape[0], 2 * acc.shape[1]]) if PAIRS else acc


@triton.jit
def _summed_splits(part_ptr, lse_ptr, heads, is_head, num_splits, SPLITS: tl.constexpr, LAYOUT: tl.constexpr):
    """Heads of a request, [HEADS, BLOCK_D]: the sum of its splits, each weighted by its share of the softmax sum."""
    BLOCK_D: tl.constexpr = LAYOUT.BLOCK_D
    H: tl.constexpr = LAYOUT.GROUP * LAYOUT.G
    columns, splits = tl.arange(0, BLOCK_D), tl.arange(0, SPLITS)
    at = heads[:, None] * LAYOUT.D + columns[None, :]
    mask = is_head[:, None] & (columns < LAYOUT.D)[None, :]
    is_split = is_head[:, None] & (splits < num_splits)[None, :]
    # A finite lower bound: a context of 0 has no split, and -inf - -inf is NaN.
    tops = tl.load(lse_ptr + splits[None, :] * H + heads[:, None], mask=is_split, other=-1e30, cache_modifier=".cg")
    top = tl.max(tops, axis=1)
    total = tl.zeros([heads.shape[0]], tl.float32)
    y = tl.zeros([heads.shape[0], BLOCK_D], tl.float32)
    for split in tl.range(0, num_splits, num_stages=SUM_STAGES):
        lse = tl.load(lse_ptr + split * H + heads, mask=is_head, other=float("-inf"), cache_modifier=".cg")
        weight = tl.math.exp2(lse - top)
        total += weight
        part = tl.load(part_ptr + split * H * LAYOUT.D + at, mask=mask, other=0.0, cache_modifier=".cg")
        y += part * weight[:, None]
    return y / tl.maximum(total, 1.0)[:, None]


@triton.jit
def _store_heads(y, out_ptr, token, heads, is_head, LAYOUT: tl.constexpr):
    """Write float32 heads [HEADS, BLOCK_D] of a token's row."""
    H: tl.constexpr = LAYOUT.GROUP * LAYOUT.G
    columns = tl.arange(0, LAYOUT.BLOCK_D)
    at = token * H * LAYOUT.D + heads[:, None] * LAYOUT.D + columns[None, :]
    mask = is_head[:, None] & (columns < LAYOUT.D)[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(part_ptr, lse_ptr, out_ptr, token, kv_head, num_splits, SPLITS: tl.constexpr, LAYOUT: tl.constexpr):
    """Add up the splits of all query heads of a key head, and write them."""
    GROUP: tl.constexpr = LAYOUT.GROUP
    HEADS: tl.constexpr = min(MOST_HEADS, triton.next_power_of_2(GROUP))
    for first in range(0, GROUP, HEADS):
        head = first + tl.arange(0, HEADS)
        heads, is_head = kv_head * GROUP + head, head < GROUP
        y = _summed_splits(part_ptr, lse_ptr, heads, is_head, num_splits, SPLITS, LAYOUT)
        _store_heads(y, out_ptr, token, heads, is_head, LAYOUT)


@triton.jit
def _paged_decode_kernel(
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
    LAYOUT: tl.constexpr,
    TURN: tl.constexpr,
    SPLITS: tl.constexpr,
    PAIRS: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """per_program splits of one request's context for the GROUP query heads of one key head.

    With TURN q_ptr holds queries, keys and values; the program that sees the last key writes it to the cache before.
    """
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    GROUP: tl.constexpr = LAYOUT.GROUP
    G: tl.constexpr = LAYOUT.G
    H: tl.constexpr = GROUP * G
    D: tl.constexpr = LAYOUT.D
    WINDOW: tl.constexpr = LAYOUT.WINDOW
    kv_head, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.load(requests.query_starts + request).to(tl.int64)
    if tl.load(requests.query_starts + request + 1) - token != 1:
        return
    context = tl.load(requests.context_lens + request)
    window_start = first_key(context, WINDOW, BLOCK_N)
    split_len = _split_len(context - window_start, SPLITS, BLOCK_N)
    first = window_start + tl.program_id(0) * per_program * split_len
    if (first >= context) & (tl.program_id(0) > 0):
        return
    last = tl.minimum(context, first + per_program * split_len)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, LAYOUT.BLOCK_D)
    heads, is_head = kv_head * GROUP + rows, rows < GROUP
    if TURN is None:
        at = token * H * D + heads[:, None] * D + columns[None, :]
        q = tl.load(q_ptr + at, mask=is_head[:, None] & (columns < D)[None, :], other=0.0)
    else:
        y = turned_heads(q_ptr, rotation, token, heads, columns, is_head, (H + 2 * G) * D, 0.0, LAYOUT, TURN)
        q = y.to(q_ptr.dtype.element_ty)
        if last == context:
            caches = (k_ptr, v_ptr, k_scale_ptr, v_scale_ptr)
            write_new_key(q_ptr, rotation, token, caches, kv_head, tl.arange(0, 2), columns, LAYOUT, TURN)
    if k_scale_ptr is not None:
        q, scale = query_codes(q, scale, INT8)
    part_ptr, lse_ptr = parts.y, parts.lse
    if SPLITS > 1:
        part_ptr += request * SPLITS * H * D
        lse_ptr += request * SPLITS * H
    table_ptr = requests.block_tables + request * max_blocks
    y = _attend(q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, part_ptr, lse_ptr, table_ptr, kv_head, first, last, context,
                window_start, split_len, scale, LAYOUT, SPLITS, PAIRS, q_ptr.dtype.element_ty, BLOCK_N)  # fmt: skip

    if SPLITS == 1:
        _store_heads(y, out_ptr, token, heads, is_head, LAYOUT)
    elif parts.arrivals is not None:
        num_splits = tl.cdiv(context - window_start, split_len)
        if is_last(parts.arrivals + request * G + kv_head, tl.cdiv(num_splits, per_program)):
            _store_sums(part_ptr, lse_ptr, out_ptr, token, kv_head, num_splits, SPLITS, LAYOUT)


@triton.jit
def _paged_decode_sum_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    requests,
    LAYOUT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """HEADS heads of one decode: the sum of its splits."""
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    H: tl.constexpr = LAYOUT.GROUP * LAYOUT.G
    request = tl.program_id(0).to(tl.int64)
    token = tl.load(requests.query_starts + request).to(tl.int64)
    if tl.load(requests.query_starts + request + 1) - token != 1:
        return
    context = tl.load(requests.context_lens + request)
    num_keys = context - first_key(context, LAYOUT.WINDOW, BLOCK_N)
    num_splits = tl.cdiv(num_keys, _split_len(num_keys, SPLITS, BLOCK_N))
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    part_ptr += request * SPLITS * H * LAYOUT.D
    lse_ptr += request * SPLITS * H
    y = _summed_splits(part_ptr, lse_ptr, heads, heads < H, num_splits, SPLITS, LAYOUT)
    _store_heads(y, out_ptr, token, heads, heads < H, LAYOUT)
