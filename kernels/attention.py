"""Attention over the paged cache: prefill chunks in causal tiles, decodes split along their context.

A request with one query row always goes through the split kernels and one with more always through the tiles, whatever
else is in the batch; and a split's length follows from its own context alone. So a row's result does not depend on its
company in the step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rope import slot_stride
from kernels.tiles import AttentionTile, current_gpu, decode_tile, prefill_tile

__all__ = ["paged_attention"]

MAX_SPLITS = 16
MIN_SPLIT = 128
"""Keys below which a context is not split further. Sixteen splits of 8 key heads fill a GPU at one request."""


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    scale: float,
) -> Tensor:
    """Attend causally over the paged cache, for prefill chunks and decodes in one batch; `reference.paged_attention`.

    Request b owns query rows query_starts[b] .. query_starts[b+1]-1; row i of its n sits at position
    context_lens[b] - n + i and sees keys 0 .. that position.        y = softmax(q k^T * scale) v

    The sums are float32; q k^T and p v multiply in q's dtype, p rounded to it.

    Args:
        q: [T, H, D] float.
        k_cache, v_cache: [num_blocks, block_size, G, D]; block_size a power of two, slots evenly spaced; H is a
            multiple of G, and heads h*H/G .. share key head h.
        block_tables: [B, max_blocks] int32, entries beyond the context never read.
        query_starts: [B + 1] int32, rising; a request may own no row.
        context_lens: [B] int32, keys of each request, this step's own included; 0 where it owns no row.
        max_query_len: the largest number of query rows of one request (a grid size; 1 for a decode step).
        scale: usually D ** -0.5.

    Returns:
        [T, H * D] in q's dtype. Rows outside every request are not defined.

    Raises:
        ValueError: H is not a multiple of G, or block_size is not a power of two.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1; Flash-Decoding (Dao et al., 2023); PagedAttention
    (arXiv 2309.06180).
    """
    (T, H, D), (_, block_size, G, _) = q.shape, k_cache.shape
    if H % G or block_size & (block_size - 1):
        raise ValueError(f"{H} query heads over {G} key heads, block_size {block_size}: not a multiple, or not 2**n")
    q, block_tables = q.contiguous(), block_tables.contiguous()
    out = torch.empty((T, H * D), dtype=q.dtype, device=q.device)
    operands = (q, k_cache, v_cache, out, block_tables, query_starts, context_lens)
    shape = {"GROUP": H // G, "D": D, "BLOCK_D": triton.next_power_of_2(D), "BLOCK_SIZE": block_size}
    if max_query_len > 1:
        _prefill(operands, shape, max_query_len, scale)
    _decode(operands, shape, scale)
    return out


def _prefill(operands: tuple[Tensor, ...], shape: dict[str, int], max_query_len: int, scale: float) -> None:
    """Launch the tiles of every request with more than one query row."""
    q, k_cache, v_cache, _, block_tables, _, context_lens = operands
    tile = prefill_tile(current_gpu(q.device), shape["BLOCK_D"], q.element_size())
    block_m = max(tile.block_m, triton.next_power_of_2(shape["GROUP"]))
    grid = (triton.cdiv(max_query_len, block_m // shape["GROUP"]), k_cache.shape[2], len(context_lens))
    _paged_attention_kernel[grid](
        *operands, slot_stride(k_cache), slot_stride(v_cache), block_tables.shape[1], scale * math.log2(math.e),
        **shape, **launch_options(tile, block_m),
    )  # fmt: skip


def _decode(operands: tuple[Tensor, ...], shape: dict[str, int], scale: float) -> None:
    """Launch the splits of every request with one query row, and the sum over a request's splits."""
    q, k_cache, v_cache, out, block_tables, query_starts, context_lens = operands
    (B, max_blocks), (_, H, D) = block_tables.shape, q.shape
    num_splits = min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(max_blocks * shape["BLOCK_SIZE"], MIN_SPLIT)))
    tile = decode_tile(current_gpu(q.device), shape["BLOCK_D"], q.element_size())
    part, lse = out, None
    if num_splits > 1:
        part = torch.empty((B, H, num_splits, D), dtype=torch.float32, device=q.device)
        lse = torch.empty((B, H, num_splits), dtype=torch.float32, device=q.device)
    _paged_decode_kernel[(num_splits, k_cache.shape[2], B)](
        q, k_cache, v_cache, part, lse, block_tables, query_starts, context_lens, slot_stride(k_cache),
        slot_stride(v_cache), max_blocks, scale * math.log2(math.e), MIN_SPLIT=MIN_SPLIT,
        **shape, **launch_options(tile, max(16, triton.next_power_of_2(shape["GROUP"]))),
    )  # fmt: skip
    if num_splits > 1:
        _paged_decode_sum_kernel[(B, H)](
            part, lse, out, query_starts, context_lens, D=D, BLOCK_D=shape["BLOCK_D"], BLOCK_N=tile.block_n,
            SPLITS=num_splits, MIN_SPLIT=MIN_SPLIT,
        )  # fmt: skip


def launch_options(tile: AttentionTile, block_m: int) -> dict[str, int]:
    """The compile-time arguments of the two tiled kernels that follow from the tile."""
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit
def _split_len(context, NUM_SPLITS, BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """Keys of one split: whole tiles, the same for every split of a request but the last."""
    return tl.maximum(MIN_SPLIT, tl.cdiv(tl.cdiv(context, NUM_SPLITS), BLOCK_N) * BLOCK_N)


@triton.jit
def _attend(
    q,
    top,
    total,
    acc,
    k_ptr,
    v_ptr,
    table_ptr,
    stride_k,
    stride_v,
    first,
    last,
    num_visible,
    scale,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Fold keys first .. last-1 into the running softmax of query rows q [BLOCK_M, BLOCK_D].

    Row m sees its first num_visible[m] keys. top: largest score so far (in powers of two), total: sum of
    exp2(score - top), acc: the same sum weighted by v. Without MASKED every row sees every key, and all tiles are full.
    """
    columns = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        is_key = keys < last
        # Masked, since a table's entries and a block's slots beyond the context may hold anything, NaN included.
        if MASKED:
            block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=is_key, other=0)
        else:
            block = tl.load(table_ptr + keys // BLOCK_SIZE)
        slots = block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
        k_ptrs = k_ptr + slots[None, :] * stride_k + columns[:, None]
        v_ptrs = v_ptr + slots[:, None] * stride_v + columns[None, :]
        if MASKED or D < BLOCK_D:
            k = tl.load(k_ptrs, mask=is_key[None, :] & (columns < D)[:, None], other=0.0).to(q.dtype)
            v = tl.load(v_ptrs, mask=is_key[:, None] & (columns < D)[None, :], other=0.0).to(q.dtype)
        else:
            k = tl.load(k_ptrs).to(q.dtype)
            v = tl.load(v_ptrs).to(q.dtype)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(keys[None, :] < num_visible[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.math.exp2(scores - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _paged_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    table_ptr,
    query_starts_ptr,
    context_lens_ptr,
    stride_k,
    stride_v,
    max_blocks,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of queries of one request; the GROUP query heads of one key head share its rows."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    kv_head, request = tl.program_id(1), tl.program_id(2)
    query_start = tl.load(query_starts_ptr + request)
    num_queries = tl.load(query_starts_ptr + request + 1) - query_start
    # Last tile first: it sees the most keys.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if (num_queries < 2) | (first_query >= num_queries):
        return
    context = tl.load(context_lens_ptr + request)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    queries = first_query + rows // GROUP
    is_row = (queries < num_queries) & (rows < QUERIES * GROUP)
    heads = kv_head * GROUP + rows % GROUP
    at = ((query_start + queries).to(tl.int64) * tl.num_programs(1) * GROUP + heads)[:, None] * D + columns[None, :]
    mask = is_row[:, None] & (columns < D)[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_ptr, v_ptr = k_cache_ptr + kv_head * D, v_cache_ptr + kv_head * D
    table_ptr += request.to(tl.int64) * max_blocks
    num_visible = context - num_queries + queries + 1
    first_visible = context - num_queries + first_query + 1
    last = tl.minimum(context, first_visible + QUERIES - 1)
    # Keys that even the first query sees need no mask.
    middle = first_visible // BLOCK_N * BLOCK_N
    top, total, acc = _attend(q, top, total, acc, k_ptr, v_ptr, table_ptr, stride_k, stride_v, 0, middle, num_visible,
                              scale, False, D, BLOCK_D, BLOCK_SIZE, BLOCK_N)  # fmt: skip
    top, total, acc = _attend(q, top, total, acc, k_ptr, v_ptr, table_ptr, stride_k, stride_v, middle, last,
                              num_visible, scale, True, D, BLOCK_D, BLOCK_SIZE, BLOCK_N)  # fmt: skip
    y = acc / tl.maximum(total, 1.0)[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _paged_decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    part_ptr,
    lse_ptr,
    table_ptr,
    query_starts_ptr,
    context_lens_ptr,
    stride_k,
    stride_v,
    max_blocks,
    scale,
    MIN_SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One split of one request's context for the GROUP query heads of one key head: its softmax, and log2 of its sum.

    With lse_ptr None there is one split, and part_ptr is the output itself.
    """
    split, kv_head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query_start = tl.load(query_starts_ptr + request)
    if tl.load(query_starts_ptr + request + 1) - query_start != 1:
        return
    context = tl.load(context_lens_ptr + request)
    num_keys = context if lse_ptr is None else _split_len(context, tl.num_programs(0), BLOCK_N, MIN_SPLIT)
    first = split * num_keys
    last = tl.minimum(context, first + num_keys)
    if (first >= context) & (split > 0):
        return
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    H = tl.num_programs(1) * GROUP
    mask = (rows < GROUP)[:, None] & (columns < D)[None, :]
    at = (query_start.to(tl.int64) * H + heads)[:, None] * D + columns[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_ptr, v_ptr = k_cache_ptr + kv_head * D, v_cache_ptr + kv_head * D
    table_ptr += request.to(tl.int64) * max_blocks
    num_visible = tl.full([BLOCK_M], last, tl.int32)
    middle = first + (last - first) // BLOCK_N * BLOCK_N
    top, total, acc = _attend(q, top, total, acc, k_ptr, v_ptr, table_ptr, stride_k, stride_v, first, middle,
                              num_visible, scale, False, D, BLOCK_D, BLOCK_SIZE, BLOCK_N)  # fmt: skip
    top, total, acc = _attend(q, top, total, acc, k_ptr, v_ptr, table_ptr, stride_k, stride_v, middle, last,
                              num_visible, scale, True, D, BLOCK_D, BLOCK_SIZE, BLOCK_N)  # fmt: skip
    # The largest score alone adds 1 to total; less means no key at all (context 0), and y is then 0.
    total = tl.maximum(total, 1.0)
    y = acc / total[:, None]
    if lse_ptr is None:
        tl.store(part_ptr + at, y.to(part_ptr.dtype.element_ty), mask=mask)
    else:
        part = (request.to(tl.int64) * H + heads) * tl.num_programs(0) + split
        tl.store(part_ptr + part[:, None] * D + columns[None, :], y, mask=mask)
        tl.store(lse_ptr + part, top + tl.math.log2(total), mask=rows < GROUP)


@triton.jit
def _paged_decode_sum_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    query_starts_ptr,
    context_lens_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    """One head of one decode: its splits' results, each weighted by its share of the whole softmax sum."""
    request, head = tl.program_id(0), tl.program_id(1)
    query_start = tl.load(query_starts_ptr + request)
    if tl.load(query_starts_ptr + request + 1) - query_start != 1:
        return
    context = tl.load(context_lens_ptr + request)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    is_split = splits * _split_len(context, SPLITS, BLOCK_N, MIN_SPLIT) < tl.maximum(context, 1)
    part = (request.to(tl.int64) * tl.num_programs(1) + head) * SPLITS + splits
    lse = tl.load(lse_ptr + part, mask=is_split, other=float("-inf"))
    # From a finite floor: a context of 0 has lse -inf in its one split, and -inf - -inf is NaN.
    weight = tl.math.exp2(lse - tl.maximum(tl.max(lse, axis=0), -1e30))
    mask = is_split[:, None] & (columns < D)[None, :]
    y = tl.load(part_ptr + part[:, None] * D + columns[None, :], mask=mask, other=0.0)
    y = tl.sum(y * weight[:, None], axis=0) / tl.maximum(tl.sum(weight, axis=0), 1.0)
    at = (query_start.to(tl.int64) * tl.num_programs(1) + head) * D + columns
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=columns < D)
