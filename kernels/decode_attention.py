"""Attention of requests with one query row: splits of the context, and the sum over a request's splits."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.launching import MAX_PLANS, Plan, cdiv, power_of_2
from kernels.paging import LIFT, Layout, first_key, fold_keys, load_blocks, lowest_top, of_head, query_codes
from kernels.quantize import quantized
from kernels.quantized import Quantized, ToInt8
from kernels.tiles import AttentionTile

__all__ = ["Operands", "decode"]

MAX_SPLITS = 16
MIN_SPLIT = 128
"""Fewest keys of a split. With one request, sixteen splits of 8 key heads fill a GPU."""

ENOUGH_PROGRAMS = 512
"""With more programs than this, each takes several splits of its request one after the other. H100, 32 requests at
context 512: 34 us; with 2048 instead it takes 37, with one split per program 43."""

SUM_HEADS = 4
"""Heads that one program sums. With all 32 a program could find the row's scale and write its codes, but that took 10
us at one request, where these and `quantize_rows` take 3."""

SUM_STAGES = 5

MIN_KEYS = tl.constexpr(MIN_SPLIT)


class Operands(NamedTuple):
    """The operands of attention; `scale` includes log2(e), since the softmax is computed in powers of two."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    scale: float
    layout: Layout


def decode(step: Operands, tile: AttentionTile, quantize: ToInt8 | None, y: Tensor | None = None) -> Tensor | Quantized:
    """Attend for every request with one query row; other rows of y [T, H * D] are not written."""
    q, layout = step.q, step.layout
    (B, max_blocks), (_, H, D) = step.block_tables.shape, q.shape
    max_keys = max_blocks * layout.BLOCK_SIZE
    if layout.WINDOW is not None:
        max_keys = min(max_keys, layout.WINDOW + tile.block_n - 1)
    num_splits = min(MAX_SPLITS, power_of_2(max(1, cdiv(max_keys, MIN_SPLIT))))
    y = torch.empty((q.shape[0], H * D), dtype=q.dtype, device=q.device) if y is None else y
    if num_splits == 1:
        _launch_splits(step, tile, y, None)
    else:
        part = torch.empty((B, num_splits, H, D), dtype=torch.float32, device=q.device)
        lse = torch.empty((B, num_splits, H), dtype=torch.float32, device=q.device)
        _launch_splits(step, tile, part, lse)
        _launch_sum(step, tile, part, lse, y)
    return quantized(y, quantize)


def _launch_splits(step: Operands, tile: AttentionTile, part: Tensor, lse: Tensor | None) -> None:
    """Launches the splits. Each writes its part; without lse each request has one split, which writes the output."""
    layout, (B, max_blocks), G = step.layout, step.block_tables.shape, step.k.shape[2]
    num_splits = 1 if lse is None else lse.shape[1]
    per_program = max(1, min(num_splits, num_splits * G * B // ENOUGH_PROGRAMS))
    _split_plan(layout, tile, num_splits, starts_early(part.device, B)).launch(
        (cdiv(num_splits, per_program), G, B), step.q, step.k, step.v, step.k_scale, step.v_scale, part, lse,
        step.block_tables, step.query_starts, step.context_lens, max_blocks, step.scale, per_program,
    )  # fmt: skip


@lru_cache(maxsize=MAX_PLANS)
def _split_plan(layout: Layout, tile: AttentionTile, num_splits: int, is_early: bool) -> Plan:
    return Plan(
        _paged_decode_kernel, LAYOUT=layout, SPLITS=num_splits, BLOCK_M=max(16, power_of_2(layout.GROUP)),
        BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
        DEPENDENT=is_early, launch_pdl=is_early,
    )  # fmt: skip


def _launch_sum(step: Operands, tile: AttentionTile, part: Tensor, lse: Tensor, out: Tensor) -> None:
    """Launches the sum over each request's splits."""
    B, num_splits, H, _ = part.shape
    heads = min(SUM_HEADS, power_of_2(H))
    plan = _sum_plan(step.layout, tile.block_n, heads, num_splits, starts_early(part.device, B))
    plan.launch((B, cdiv(H, heads), 1), part, lse, out, step.query_starts, step.context_lens, H)


@lru_cache(maxsize=MAX_PLANS)
def _sum_plan(layout: Layout, block_n: int, heads: int, num_splits: int, is_early: bool) -> Plan:
    return Plan(
        _paged_decode_sum_kernel, HEADS=heads, D=layout.D, BLOCK_D=layout.BLOCK_D, BLOCK_N=block_n, SPLITS=num_splits,
        STAGES=SUM_STAGES, WINDOW=layout.WINDOW, num_warps=max(1, heads * layout.BLOCK_D // 256),
        DEPENDENT=is_early, launch_pdl=is_early,
    )  # fmt: skip


@triton.jit
def _split_len(num_keys, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of one split of num_keys: whole tiles, the same for all splits of a request except the last."""
    return tl.maximum(MIN_KEYS, tl.cdiv(tl.cdiv(num_keys, SPLITS), BLOCK_N) * BLOCK_N)


@triton.jit
def _paged_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    part_ptr,
    lse_ptr,
    table_ptr,
    query_starts_ptr,
    context_lens_ptr,
    max_blocks,
    scale,
    per_program,
    LAYOUT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """per_program splits of one request's context for the GROUP query heads of one key head.

    Writes each split's softmax times v and log2 of its sum. With lse_ptr None there is one split and part_ptr is the
    output.
    """
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    D: tl.constexpr = LAYOUT.D
    GROUP: tl.constexpr = LAYOUT.GROUP
    BLOCK_D: tl.constexpr = LAYOUT.BLOCK_D
    WINDOW: tl.constexpr = LAYOUT.WINDOW
    kv_head, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query_start = tl.load(query_starts_ptr + request)
    if tl.load(query_starts_ptr + request + 1) - query_start != 1:
        return
    context = tl.load(context_lens_ptr + request)
    window_start = first_key(context, WINDOW, BLOCK_N)
    split_len = _split_len(context - window_start, SPLITS, BLOCK_N)
    first = window_start + tl.program_id(0) * per_program * split_len
    last = tl.minimum(context, first + per_program * split_len)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    heads, H = kv_head * GROUP + rows, tl.num_programs(1) * GROUP
    mask = (rows < GROUP)[:, None] & (columns < D)[None, :]
    at = (query_start.to(tl.int64) * H + heads)[:, None] * D + columns[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)
    if k_scale_ptr is not None:
        # Not in int8, whose operands take more registers: H100s and H200s wait for the cache's bytes here.
        q, scale = query_codes(q, scale, False)

    top = tl.full([BLOCK_M], lowest_top(WINDOW), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr = of_head(k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, kv_head, LAYOUT)
    table_ptr += request * max_blocks
    num_visible = tl.full([BLOCK_M], last if WINDOW is None else context, tl.int32)
    blocks = load_blocks(table_ptr, first, last, LAYOUT.BLOCK_SIZE, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        next_blocks = load_blocks(table_ptr, start + BLOCK_N, last, LAYOUT.BLOCK_SIZE, BLOCK_N)
        # A split starts from the lowest maximum, which also scales what the split before left to 0.
        top = tl.where((start - window_start) % split_len == 0, lowest_top(WINDOW), top)
        top, total, acc = fold_keys(q, top, total, acc, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, blocks, start, last,
                                    last, num_visible, scale, True, q_ptr.dtype.element_ty,
                                    LAYOUT, BLOCK_N)  # fmt: skip
        blocks = next_blocks
        if lse_ptr is not None:
            end = start + BLOCK_N
            if ((end - window_start) % split_len == 0) | (end >= last):
                part = (request * SPLITS + (start - window_start) // split_len) * H + heads
                y = acc / (total if v_scale_ptr is None else total * LIFT)[:, None]
                tl.store(part_ptr + part[:, None] * D + columns[None, :], y, mask=mask)
                tl.store(lse_ptr + part, top + tl.math.log2(total), mask=rows < GROUP)
    if lse_ptr is None:
        # The largest score adds 1 to total. Less than 1 means no key (context 0), and y is then 0.
        total = tl.maximum(total, 1.0)
        y = acc / (total if v_scale_ptr is None else total * LIFT)[:, None]
        tl.store(part_ptr + at, y.to(part_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _paged_decode_sum_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    query_starts_ptr,
    context_lens_ptr,
    H,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """HEADS heads of one decode: the sum of its splits, each weighted by its share of the softmax sum."""
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    request = tl.program_id(0).to(tl.int64)
    query_start = tl.load(query_starts_ptr + request).to(tl.int64)
    if tl.load(query_starts_ptr + request + 1) - query_start != 1:
        return
    context = tl.load(context_lens_ptr + request)
    num_keys = context - first_key(context, WINDOW, BLOCK_N)
    num_splits = tl.cdiv(num_keys, _split_len(num_keys, SPLITS, BLOCK_N))
    heads, columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
    is_head = heads < H
    at = heads[:, None] * D + columns[None, :]
    mask = is_head[:, None] & (columns < D)[None, :]
    row, splits = request * SPLITS * H, tl.arange(0, SPLITS)
    is_split = is_head[:, None] & (splits < num_splits)[None, :]
    # A finite lower bound: a context of 0 has no split, and -inf - -inf is NaN.
    tops = tl.load(lse_ptr + row + splits[None, :] * H + heads[:, None], mask=is_split, other=-1e30)
    top = tl.max(tops, axis=1)
    total = tl.zeros([HEADS], tl.float32)
    y = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for split in tl.range(0, num_splits, num_stages=STAGES):
        lse = tl.load(lse_ptr + row + split * H + heads, mask=is_head, other=float("-inf"))
        weight = tl.math.exp2(lse - top)
        total += weight
        y += tl.load(part_ptr + (row + split * H) * D + at, mask=mask, other=0.0) * weight[:, None]
    y = y / tl.maximum(total, 1.0)[:, None]
    tl.store(out_ptr + query_start * H * D + at, y.to(out_ptr.dtype.element_ty), mask=mask)
