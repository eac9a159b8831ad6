"""Addresses in the paged cache, and the step of the softmax over it that prefill and decode share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from kernels.launching import MAX_PLANS, power_of_2
from kernels.quantize import INTERPRETED, magnitude, to_codes, to_scale
from kernels.quantized import Quantized

__all__ = [
    "REQUESTS",
    "Layout",
    "Strides",
    "codes_of",
    "dequantized",
    "first_key",
    "fold_keys",
    "fold_pairs",
    "key_offsets",
    "load_blocks",
    "lowest_top",
    "owner_of",
    "paged_layout",
    "query_codes",
    "rounded_queries",
    "scale_of",
    "widen_pairs",
]

MAX_NARROW = 2**31
"""Number of elements that 32-bit offsets reach; they take half the address arithmetic of 64-bit ones."""

# Keeps p * v_scale out of float16's subnormals. The scale of float16 values is at most 65504 / 127: it stays finite.
LIFT = tl.constexpr(64.0)

REQUESTS = tl.constexpr(256)
"""Requests whose places a program reads at once."""

Sizes = tuple[int, ...]

LOG2_E = tl.constexpr(math.log2(math.e))

# A float16 whose high byte is 0x64 and whose low byte is code + 128 is 1152 + code: five instructions for four codes,
# while the plain conversion of each code runs at an eighth of their rate.
CODES_TO_HALF = tl.constexpr("""{
    .reg .b32 bytes, ones, bias;
    xor.b32 bytes, $2, 0x80808080;
    mov.b32 ones, 0x64646464;
    mov.b32 bias, 0x64806480;
    prmt.b32 $0, bytes, ones, 0x4140;
    prmt.b32 $1, bytes, ones, 0x4342;
    sub.f16x2 $0, $0, bias;
    sub.f16x2 $1, $1, bias;
}""")


# The same of two pairs of codes: the first of each pair, and the second.
PAIRS_TO_HALF = tl.constexpr("""{
    .reg .b32 bytes, ones, bias;
    xor.b32 bytes, $2, 0x80808080;
    mov.b32 ones, 0x64646464;
    mov.b32 bias, 0x64806480;
    prmt.b32 $0, bytes, ones, 0x4240;
    prmt.b32 $1, bytes, ones, 0x4341;
    sub.f16x2 $0, $0, bias;
    sub.f16x2 $1, $1, bias;
}""")


@dataclass(frozen=True, slots=True)
class Strides:
    """Distance in elements from one block, one slot and one key head of a cache to the next."""

    BLOCK: int
    SLOT: int
    HEAD: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What attention is compiled for: G key heads of GROUP query heads, head size D, the strides of the caches.

    IS_WIDE: whether offsets need 64 bits.
    WINDOW: number of keys a query sees, its own the last; None for all up to its own.
    SOFT_CAP: bound of the scores' magnitude; None for none.
    """

    G: int
    GROUP: int
    D: int
    BLOCK_D: int
    BLOCK_SIZE: int
    K: Strides
    V: Strides
    K_SCALE: Strides | None
    V_SCALE: Strides | None
    IS_WIDE: bool
    WINDOW: int | None
    SOFT_CAP: float | None


def codes_of(cache: Tensor | Quantized) -> Tensor:
    """The tensor that holds keys or values, float or int8."""
    return cache.codes if isinstance(cache, Quantized) else cache


def scale_of(cache: Tensor | Quantized) -> Tensor | None:
    """The scales [num_blocks, block_size, G] of an int8 cache, or None."""
    return cache.scale if isinstance(cache, Quantized) else None


def paged_layout(
    num_heads: int,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Layout:
    """The layout of two caches under num_heads query heads.

    Raises:
        ValueError: num_heads is not a multiple of the key heads, block_size is not a power of two, or a head's
            elements are not contiguous.
    """
    k, v, k_scale, v_scale = codes_of(k_cache), codes_of(v_cache), scale_of(k_cache), scale_of(v_cache)
    return _layout(
        num_heads,
        k.shape,
        k.stride(),
        v.shape,
        v.stride(),
        None if k_scale is None else k_scale.stride(),
        None if v_scale is None else v_scale.stride(),
        window,
        soft_cap,
    )


@lru_cache(maxsize=MAX_PLANS)
def _layout(
    num_heads: int,
    k_shape: Sizes,
    k_strides: Sizes,
    v_shape: Sizes,
    v_strides: Sizes,
    k_scale_strides: Sizes | None,
    v_scale_strides: Sizes | None,
    window: int | None,
    soft_cap: float | None,
) -> Layout:
    """See `paged_layout`."""
    _, block_size, num_kv_heads, head_size = k_shape
    if num_heads % num_kv_heads or block_size & (block_size - 1):
        raise ValueError(
            f"{num_heads} query heads over {num_kv_heads} key heads, block_size {block_size}: "
            "not a multiple, or not 2**n"
        )
    return Layout(
        G=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        D=head_size,
        BLOCK_D=power_of_2(head_size),
        BLOCK_SIZE=block_size,
        K=_strides_of(k_shape, k_strides),
        V=_strides_of(v_shape, v_strides),
        K_SCALE=None if k_scale_strides is None else Strides(*k_scale_strides),
        V_SCALE=None if v_scale_strides is None else Strides(*v_scale_strides),
        IS_WIDE=max(_reach(k_shape, k_strides), _reach(v_shape, v_strides)) > MAX_NARROW,
        WINDOW=window,
        SOFT_CAP=soft_cap,
    )


def _strides_of(shape: Sizes, strides: Sizes) -> Strides:
    """The strides of keys or values [num_blocks, block_size, G, D].

    Raises:
        ValueError: a head's elements are not contiguous.
    """
    block, slot, head, per_element = strides
    if per_element != 1:
        raise ValueError(f"a cache of shape {tuple(shape)} cannot have strides {strides}")
    return Strides(block, slot, head)


def _reach(shape: Sizes, strides: Sizes) -> int:
    """Distance in elements from the first to one past the last."""
    return sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True)) + 1


@triton.jit
def key_offsets(blocks, slots, STRIDES: tl.constexpr, IS_WIDE: tl.constexpr):
    """Distance in elements from the start of a cache to slots of blocks."""
    if IS_WIDE:
        blocks = blocks.to(tl.int64)
    return blocks * STRIDES.BLOCK + slots * STRIDES.SLOT


@triton.jit
def _load(ptrs, mask, MASKED: tl.constexpr):
    """A load; 0 where the mask is false."""
    return tl.load(ptrs, mask=mask, other=0) if MASKED else tl.load(ptrs)


@triton.jit
def _widen(x, TYPE: tl.constexpr):
    """Values in another dtype. int8 codes become float16 four at a time, exactly."""
    if x.dtype == tl.int8 and tl.float16 == TYPE and not INTERPRETED:
        y = tl.inline_asm_elementwise(CODES_TO_HALF, "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)
    else:
        y = x.to(TYPE)
    return y


@triton.jit
def widen_pairs(x, TYPE: tl.constexpr):
    """The low and the high bytes of int16 as signed values in TYPE, exactly."""
    if tl.float16 == TYPE and not INTERPRETED:
        low, high = tl.inline_asm_elementwise(
            PAIRS_TO_HALF, "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        low, high = ((x << 8) >> 8).to(TYPE), (x >> 8).to(TYPE)
    return low, high


@triton.jit
def dequantized(codes, scale_ptr, blocks, slots, is_key, MASKED: tl.constexpr, TYPE: tl.constexpr,
                STRIDES: tl.constexpr, IS_WIDE: tl.constexpr):  # fmt: skip
    """What codes [keys, BLOCK_D] of slots of blocks stand for, rounded to TYPE; values without scales as they are.

    By way of float16, which holds codes exactly and is made of them faster.
    """
    if scale_ptr is None:
        y = codes
    else:
        scale = _load(scale_ptr + key_offsets(blocks, slots, STRIDES, IS_WIDE), is_key, MASKED)
        y = (_widen(codes, tl.float16).to(tl.float32) * scale[:, None]).to(TYPE)
    return y


@triton.jit
def query_codes(q, scale, INT8: tl.constexpr):
    """The codes of queries [BLOCK_M, BLOCK_D], by the rules of `quantize_rows`, and scale times their scales [BLOCK_M].

    INT8: in int8; else in q's dtype, where codes are exact as well, and so are the float32 sums of their products.
    """
    x = q.to(tl.float32)
    row_scale = to_scale(tl.max(magnitude(x), axis=1))
    codes = to_codes(x, row_scale[:, None])
    return codes if INT8 else codes.to(q.dtype), scale * row_scale


@triton.jit
def rounded_queries(q, IS_ROUNDED: tl.constexpr):
    """What the codes of queries [heads, BLOCK_D] stand for, in their dtype; without IS_ROUNDED the queries.

    Their codes and scales are those of the queries, to the bit: the largest value of a head stays as it is, in float32
    but for an ulp that leaves the scale.
    """
    y = q
    if IS_ROUNDED:
        codes, scale = query_codes(q, 1.0, False)
        y = (codes.to(tl.float32) * scale[:, None]).to(q.dtype)
    return y


@triton.jit
def _scores(q, k, TYPE: tl.constexpr):
    """q k^T in float32, of codes if both are; they are exact in every float dtype, and so is the sum."""
    if q.dtype == tl.int8:
        scores = tl.dot(q, tl.trans(k)).to(tl.float32)
    else:
        scores = tl.dot(q, tl.trans(_widen(k, TYPE)), input_precision="ieee")
    return scores


@triton.jit
def owner_of(nth, tile, query_starts_ptr, num_requests, QUERIES: tl.constexpr):
    """The request of a tile. Request r owns the tiles from query_starts[r] // QUERIES + r on, as many as it needs.

    These are below the next request's first, as cdiv(n, QUERIES) <= (start + n) // QUERIES - start // QUERIES + 1.
    nth: 0, 1 .. in the caller's layout, one for each request that is read at once.
    """
    request = -1
    for first in range(0, num_requests, nth.shape[0]):
        requests = first + nth
        starts = tl.load(query_starts_ptr + requests, mask=requests < num_requests, other=2**30)
        request += tl.sum((starts // QUERIES + requests <= tile).to(tl.int32))
    return request


@triton.jit
def load_blocks(table_ptr, start, last, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The blocks of keys start .. start + BLOCK_N - 1, each below last; one number if a block holds them all.

    A loop over keys loads them one iteration ahead: if other loads of the same iteration waited for them, Triton would
    keep half as many tiles of keys in flight.
    """
    keys = start if BLOCK_SIZE >= BLOCK_N else start + tl.arange(0, BLOCK_N)
    return tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < last, other=0)


@triton.jit
def first_key(num_visible, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of the first tile that a query reads which has num_visible keys up to its own."""
    return 0 if WINDOW is None else tl.maximum(num_visible - WINDOW, 0) // BLOCK_N * BLOCK_N


@triton.jit
def lowest_top(WINDOW: tl.constexpr):
    """The initial value of a running maximum of scores.

    Finite with a window: a row may see no key of a tile that another row needs, and -inf - -inf is NaN.
    """
    return float("-inf") if WINDOW is None else -1e30


@triton.jit
def _soft_cap(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP) in powers of two: with e^2u = exp2(2u * log2(e)), tanh(u) = 1 - 2 / (1 + e^2u)."""
    LIMIT: tl.constexpr = CAP * LOG2_E
    return LIMIT * (1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2_E / LIMIT))))


@triton.jit
def key_weights(
    q,
    k,
    top,
    total,
    k_scale_ptr,
    v_scale_ptr,
    blocks,
    start,
    last,
    num_unmasked,
    num_visible,
    scale,
    MASKED: tl.constexpr,
    TYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add keys k [BLOCK_N, BLOCK_D], start and up, to the running maximum and sum of query rows q [BLOCK_M, BLOCK_D].

    Returns both, what scales all that was summed before [BLOCK_M], and the weights of the keys' values
    [BLOCK_M, BLOCK_N] in TYPE, times LIFT if v is int8. The other arguments are those of `fold_keys`.
    """
    WINDOW: tl.constexpr = LAYOUT.WINDOW
    SOFT_CAP: tl.constexpr = LAYOUT.SOFT_CAP
    K_SCALE: tl.constexpr = LAYOUT.K_SCALE
    V_SCALE: tl.constexpr = LAYOUT.V_SCALE
    keys = start + tl.arange(0, BLOCK_N)
    is_key = keys < last
    slots = keys % LAYOUT.BLOCK_SIZE
    scores = _scores(q, k, TYPE)
    if k_scale_ptr is not None:
        at = key_offsets(blocks, slots, K_SCALE, LAYOUT.IS_WIDE)
        scores *= _load(k_scale_ptr + at, is_key, MASKED)[None, :]
    row_scale = scale if k_scale_ptr is None else scale[:, None]
    if SOFT_CAP is not None:
        scores = _soft_cap(scores * row_scale, SOFT_CAP)
        scale, row_scale = 1.0, 1.0
    if WINDOW is not None:
        is_seen = (keys[None, :] < num_visible[:, None]) & (keys[None, :] >= (num_visible - WINDOW)[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
    elif MASKED:  # noqa: SIM102
        if start + BLOCK_N > num_unmasked:
            scores = tl.where(keys[None, :] < num_visible[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    p = tl.math.exp2(scores * row_scale - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(p, axis=1)
    if v_scale_ptr is not None:
        at = key_offsets(blocks, slots, V_SCALE, LAYOUT.IS_WIDE)
        p *= (_load(v_scale_ptr + at, is_key, MASKED) * LIFT)[None, :]
    return new_top, total, shrink, p.to(TYPE)


@triton.jit
def fold_keys(
    q,
    top,
    total,
    acc,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    blocks,
    start,
    last,
    num_unmasked,
    num_visible,
    scale,
    MASKED: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    TYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add keys start .. start + BLOCK_N - 1 to the running softmax of query rows q [BLOCK_M, BLOCK_D].

    scale: of the scores; [BLOCK_M] where queries and keys are codes, in int8 or in a float dtype.
    DEQUANTIZE: multiply what the codes of keys and values stand for instead, rounded to TYPE; queries are floats, and
        acc has no LIFT.
    TYPE: what p and v are multiplied in, and q and k unless both are int8.

    Row m sees its first num_visible[m] keys, or the last WINDOW of them. Without a window every row sees the first
    num_unmasked keys, and without MASKED every key. Keys from `last` on are not read. start is a multiple of BLOCK_N.
    top: largest score so far (in powers of two); total: sum of exp2(score - top); acc: the same sum weighted by v,
    times LIFT if v is int8.
    """
    K: tl.constexpr = LAYOUT.K
    V: tl.constexpr = LAYOUT.V
    K_SCALE: tl.constexpr = LAYOUT.K_SCALE
    V_SCALE: tl.constexpr = LAYOUT.V_SCALE
    columns = tl.arange(0, LAYOUT.BLOCK_D)
    keys = start + tl.arange(0, BLOCK_N)
    slots = keys % LAYOUT.BLOCK_SIZE
    k_at = key_offsets(blocks, slots, K, LAYOUT.IS_WIDE)[:, None] + columns[None, :]
    v_at = key_offsets(blocks, slots, V, LAYOUT.IS_WIDE)[:, None] + columns[None, :]
    # Masked: a slot beyond the context may hold anything, NaN included.
    is_there = (keys < last)[:, None] & (columns < LAYOUT.D)[None, :]
    HAS_GAPS: tl.constexpr = MASKED or LAYOUT.D < LAYOUT.BLOCK_D
    k = _load(k_ptr + k_at, is_there, HAS_GAPS)
    v = _load(v_ptr + v_at, is_there, HAS_GAPS)
    if DEQUANTIZE:
        k = dequantized(k, k_scale_ptr, blocks, slots, keys < last, MASKED, TYPE, K_SCALE, LAYOUT.IS_WIDE)
        v = dequantized(v, v_scale_ptr, blocks, slots, keys < last, MASKED, TYPE, V_SCALE, LAYOUT.IS_WIDE)
    k_scales = None if DEQUANTIZE else k_scale_ptr
    v_scales = None if DEQUANTIZE else v_scale_ptr
    v = _widen(v, TYPE)
    top, total, shrink, p = key_weights(q, k, top, total, k_scales, v_scales, blocks, start, last, num_unmasked,
                                        num_visible, scale, MASKED, TYPE, LAYOUT, BLOCK_N)  # fmt: skip
    return top, total, tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")


@triton.jit
def fold_pairs(
    q,
    top,
    total,
    even,
    odd,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    blocks,
    start,
    last,
    num_visible,
    scale,
    TYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`fold_keys`, masked, over int8 values read two at a time. even, odd: acc's columns, [BLOCK_M, BLOCK_D / 2].

    The matrix instruction wants neighbouring keys of a column in one register. Single bytes are turned around by a load
    each, 128 a thread for a tile; pairs are turned by the load that does so for 16 bits.
    """
    K: tl.constexpr = LAYOUT.K
    V: tl.constexpr = LAYOUT.V
    HALF: tl.constexpr = LAYOUT.BLOCK_D // 2
    columns, halves, keys = tl.arange(0, LAYOUT.BLOCK_D), tl.arange(0, HALF), start + tl.arange(0, BLOCK_N)
    slots, is_key = keys % LAYOUT.BLOCK_SIZE, (keys < last)[:, None]
    k_at = key_offsets(blocks, slots, K, LAYOUT.IS_WIDE)[:, None] + columns[None, :]
    v_at = key_offsets(blocks, slots, V, LAYOUT.IS_WIDE)[:, None] // 2 + halves[None, :]
    k = tl.load(k_ptr + k_at, mask=is_key & (columns < LAYOUT.D)[None, :], other=0)
    pairs_ptr = v_ptr.to(tl.pointer_type(tl.int16))
    pairs = tl.load(pairs_ptr + v_at, mask=is_key & (halves < LAYOUT.D // 2)[None, :], other=0)
    even_v, odd_v = widen_pairs(pairs, TYPE)
    top, total, shrink, p = key_weights(q, k, top, total, k_scale_ptr, v_scale_ptr, blocks, start, last, last,
                                        num_visible, scale, True, TYPE, LAYOUT, BLOCK_N)  # fmt: skip
    even = tl.dot(p, even_v, even * shrink[:, None], input_precision="ieee")
    odd = tl.dot(p, odd_v, odd * shrink[:, None], input_precision="ieee")
    return top, total, even, odd
