"""Keys and values of an int8 cache as floats, once for all tiles of a prompt that multiply them.

A tile that converts codes does so for its own 64 or 128 rows, and the next tile again; a matrix instruction of Hopper
even takes its operands from shared memory, where codes come from registers. So the keys and values of the step's
prompts are written as floats first, in one pass, and attention reads those as it reads a float cache. A request that
finds no room there converts codes itself, to the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_step import Operands
from kernels.launching import MAX_PLANS, Plan, cdiv
from kernels.paging import REQUESTS, Layout, Strides, dequantized, first_key, key_offsets
from kernels.tiles import KEYS_PER_TOKEN

__all__ = ["as_floats", "num_dequantized"]

MIN_QUERIES = tl.constexpr(64)
"""Fewest query rows of a request whose keys are dequantized before: with few rows each is used about once."""

MIN_TOKENS = 512
"""Fewest tokens of a step that dequantizes before."""

KEYS = 16
"""Most keys of a program. H200, 16 prompts of 2048: 62.6 us, with 32 keys 67.0; one prompt 6.0, 8.2."""

NUM_WARPS = 4

HEAD_STAGES = tl.constexpr(3)
"""Heads that a program has in flight."""

MAX_TILE = 128
"""Most keys of a tile of attention."""


def num_dequantized(num_tokens: int, block_size: int) -> int:
    """Keys that a step of num_tokens has room for, a multiple of block_size; 0 if it reads codes."""
    return 0 if num_tokens < MIN_TOKENS else cdiv(KEYS_PER_TOKEN * num_tokens, block_size) * block_size


def as_floats(step: Operands, num_keys: int, block_n: int) -> tuple[Operands, Tensor]:
    """The step over keys and values in q's dtype, and places int32 [B + 1]: of each request's first key there.

    Requests are served in their order, and the keys of one follow each other. The place is -1 for a request of few
    rows, and for one that finds too few of the num_keys places left; the last entry is how many prompts these are.
    Tiles of block_n keys that no query sees are left out.
    """
    layout, requests = step.layout, step.requests
    num_requests, max_blocks = requests.block_tables.shape
    size = num_keys // layout.BLOCK_SIZE, layout.BLOCK_SIZE, layout.G, layout.D
    k, v = torch.empty((2, *size), dtype=step.q.dtype, device=step.q.device)
    keys = min(KEYS, layout.BLOCK_SIZE)
    places = torch.empty(num_requests + 1, dtype=torch.int32, device=step.q.device)
    _plan(layout, block_n, keys).launch(
        (num_keys // keys, 1, 1), step.k, step.v, step.k_scale, step.v_scale, k, v, places,
        *requests, num_requests, max_blocks, num_keys,
    )  # fmt: skip
    floats = step._replace(k=k, v=v, k_scale=None, v_scale=None, layout=_float_layout(layout))
    return floats, places


@lru_cache(maxsize=MAX_PLANS)
def _float_layout(layout: Layout) -> Layout:
    """The layout of floats whose slots follow each other, in blocks that hold a tile."""
    slot = layout.G * layout.D
    strides = Strides(MAX_TILE * slot, slot, layout.D)
    return replace(layout, BLOCK_SIZE=MAX_TILE, K=strides, V=strides, K_SCALE=None, V_SCALE=None)


@lru_cache(maxsize=MAX_PLANS)
def _plan(layout: Layout, block_n: int, keys: int) -> Plan:
    # Steps that are this large start no kernel early.
    return Plan(_dequantize_kernel, LAYOUT=layout, BLOCK_N=block_n, KEYS=keys, num_warps=NUM_WARPS, num_stages=1)


@triton.jit
def _num_keys(query_starts_ptr, context_lens_ptr, requests, num_requests, num_keys, BLOCK_SIZE: tl.constexpr):
    """Keys of requests that are dequantized if there is room behind those before: whole blocks.

    0 for a request of few rows, and for one that num_keys places alone do not hold.
    """
    is_request = requests < num_requests
    starts = tl.load(query_starts_ptr + requests, mask=is_request, other=0)
    ends = tl.load(query_starts_ptr + requests + 1, mask=is_request, other=0)
    contexts = tl.load(context_lens_ptr + requests, mask=is_request, other=0)
    sizes = tl.cdiv(contexts, BLOCK_SIZE) * BLOCK_SIZE
    return tl.where((ends - starts >= MIN_QUERIES) & (sizes <= num_keys), sizes, 0)


@triton.jit
def _write_places(places_ptr, query_starts_ptr, context_lens_ptr, num_requests, num_keys, BLOCK_SIZE: tl.constexpr):
    """Write the place of each request's first key, or -1, and behind them how many prompts have none."""
    end, num_left = 0, 0
    for start in range(0, num_requests, REQUESTS):
        requests = start + tl.arange(0, REQUESTS)
        is_request = requests < num_requests
        sizes = _num_keys(query_starts_ptr, context_lens_ptr, requests, num_requests, num_keys, BLOCK_SIZE)
        ends = end + tl.cumsum(sizes)
        places = tl.where((sizes > 0) & (ends <= num_keys), ends - sizes, -1)
        tl.store(places_ptr + requests, places, mask=is_request)
        first = tl.load(query_starts_ptr + requests, mask=is_request, other=0)
        num_rows = tl.load(query_starts_ptr + requests + 1, mask=is_request, other=0) - first
        num_left += tl.sum(((num_rows > 1) & (places < 0)).to(tl.int32))
        end = tl.max(ends)
    tl.store(places_ptr + num_requests, num_left)


@triton.jit
def _owner_of_key(key, query_starts_ptr, context_lens_ptr, num_requests, num_keys, BLOCK_SIZE: tl.constexpr):
    """The request of a key's place, or num_requests if there is none; and the place of its first key."""
    request, first, end = 0, 0, 0
    for start in range(0, num_requests, REQUESTS):
        requests = start + tl.arange(0, REQUESTS)
        sizes = _num_keys(query_starts_ptr, context_lens_ptr, requests, num_requests, num_keys, BLOCK_SIZE)
        ends = end + tl.cumsum(sizes)
        is_before = (ends <= key) & (requests < num_requests)
        request += tl.sum(is_before.to(tl.int32))
        first = tl.maximum(first, tl.max(tl.where(is_before, ends, 0)))
        end = tl.max(ends)
    return request, first


@triton.jit(do_not_specialize=["num_requests"])
def _dequantize_kernel(
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_out_ptr,
    v_out_ptr,
    places_ptr,
    table_ptr,
    query_starts_ptr,
    context_lens_ptr,
    num_requests,
    max_blocks,
    num_keys,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
):
    """KEYS keys and values, all in one block, of all heads."""
    BLOCK_SIZE: tl.constexpr = LAYOUT.BLOCK_SIZE
    K: tl.constexpr = LAYOUT.K
    V: tl.constexpr = LAYOUT.V
    K_SCALE: tl.constexpr = LAYOUT.K_SCALE
    V_SCALE: tl.constexpr = LAYOUT.V_SCALE
    if tl.program_id(0) == 0:
        _write_places(places_ptr, query_starts_ptr, context_lens_ptr, num_requests, num_keys, BLOCK_SIZE)
    start = tl.program_id(0) * KEYS
    request, first = _owner_of_key(start, query_starts_ptr, context_lens_ptr, num_requests, num_keys, BLOCK_SIZE)
    if request == num_requests:
        return
    context = tl.load(context_lens_ptr + request)
    num_queries = tl.load(query_starts_ptr + request + 1) - tl.load(query_starts_ptr + request)
    key = start - first
    has_room = first + tl.cdiv(context, BLOCK_SIZE) * BLOCK_SIZE <= num_keys
    is_seen = (key < context) & (key + KEYS > first_key(context - num_queries + 1, LAYOUT.WINDOW, BLOCK_N))
    if has_room & is_seen:
        block = tl.load(table_ptr + request.to(tl.int64) * max_blocks + key // BLOCK_SIZE)
        keys, columns = tl.arange(0, KEYS), tl.arange(0, LAYOUT.BLOCK_D)
        slots, is_key = key % BLOCK_SIZE + keys, key + keys < context
        to = (start + keys).to(tl.int64)[:, None] * (LAYOUT.G * LAYOUT.D) + columns[None, :]
        is_there = is_key[:, None] & (columns < LAYOUT.D)[None, :]
        for head in tl.range(0, LAYOUT.G, num_stages=HEAD_STAGES):
            k = _head(k_ptr, k_scale_ptr, head, block, slots, is_key, is_there, K, K_SCALE, LAYOUT)
            v = _head(v_ptr, v_scale_ptr, head, block, slots, is_key, is_there, V, V_SCALE, LAYOUT)
            tl.store(k_out_ptr + to + head * LAYOUT.D, k.to(k_out_ptr.dtype.element_ty), mask=is_there)
            tl.store(v_out_ptr + to + head * LAYOUT.D, v.to(v_out_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def _head(ptr, scale_ptr, head, block, slots, is_key, is_there, STRIDES: tl.constexpr, SCALE_STRIDES: tl.constexpr,
          LAYOUT: tl.constexpr):  # fmt: skip
    """Slots of a block of one head in float32, [KEYS, BLOCK_D]."""
    columns = tl.arange(0, LAYOUT.BLOCK_D)
    at = key_offsets(block, slots, STRIDES, LAYOUT.IS_WIDE)[:, None] + head * STRIDES.HEAD + columns[None, :]
    codes = tl.load(ptr + at, mask=is_there, other=0)
    scale_ptr += head * SCALE_STRIDES.HEAD
    return dequantized(codes, scale_ptr, block, slots, is_key, True, tl.float32, SCALE_STRIDES, LAYOUT.IS_WIDE)
