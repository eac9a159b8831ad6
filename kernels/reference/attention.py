"""Rotary embedding, the write to the paged cache, and attention over it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.quantized import Quantized, ToInt8
from kernels.reference.common import quantize_rows, store
from kernels.rows import Rows

TILE = 64
"""Query rows that are multiplied at once: those of positions t * TILE .. (t + 1) * TILE - 1, some of which may not be
in the step, over as many keys as there are positions up to the last. So the shapes of a row's products, and with them
the order of its sums, follow from its position alone, not from the piece of the prompt that it is computed in."""

VECTOR = 16
"""Number of float32 values in the widest vector register."""


def rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys by their positions; write keys and values into the paged cache.

    For i < R/2, with c, s = cos_sin[position, i], cos_sin[position, R/2 + i]:
        out_i = x_i c - x_{i+R/2} s        out_{i+R/2} = x_{i+R/2} c + x_i s        (columns from R on unchanged)
    With weights each head of q and k is first normed: x / sqrt(mean_d x^2 + eps) * weight.

    Args:
        qkv: [T, (H + 2G) D] float: queries, then keys, then values, head by head.
        positions: [T] int32, row of cos_sin.
        slots: [T] int32, block * block_size + offset; -1 writes nothing (a padding row).
        cos_sin: [P, R] float32, contiguous, R even and at most D; with R = 0 nothing is rotated.
        k_cache, v_cache: [num_blocks, block_size, G, D], written in place; block_size a power of two, a head's D
            elements contiguous. Either may be `Quantized`, int8 codes with a float32 scale [num_blocks, block_size, G]:
            each token's head is then rounded with its own scale, by the rules of `quantize_rows`, the key after its
            rotation in float32.
        num_heads: H.
        q_weight, k_weight: [D] float, of the norms of queries and keys; both or neither.
        eps: added to the mean square.
        sink: [S, (H + 2G) D] in qkv's dtype: row p stands in for the row of qkv of every token at position p < S.

    Returns:
        q [T, H, D] in qkv's dtype, rotated. Over int8 keys it holds what the codes of each head stand for, by the rules
        of `quantize_rows`: codes of that are the same.

    Source: RoFormer (arXiv 2104.09864), equation 34, with halves instead of neighbours paired; PagedAttention
    (arXiv 2309.06180); norms of queries and keys: arXiv 2302.05442, section 2.
    """
    num_kv_heads, head_size = (k_cache.codes if isinstance(k_cache, Quantized) else k_cache).shape[-2:]
    if sink is not None:
        qkv = torch.where((positions < len(sink))[:, None], sink[positions.clamp(max=len(sink) - 1)], qkv)
    qkv = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_size)
    heads = qkv[:, : num_heads + num_kv_heads].float()
    if q_weight is not None and k_weight is not None:
        weight = torch.cat((q_weight.float().expand(num_heads, -1), k_weight.float().expand(num_kv_heads, -1)))
        heads = heads * (heads.square().mean(-1, keepdim=True) + eps).rsqrt_() * weight
    rotated = _rotate(heads, cos_sin[positions])
    slots = slots.long()
    if slots.min().item() < 0:
        keep = slots >= 0
        slots, rotated_k, v = slots[keep], rotated[keep, num_heads:], qkv[keep, num_heads + num_kv_heads :]
    else:
        rotated_k, v = rotated[:, num_heads:], qkv[:, num_heads + num_kv_heads :]
    _write_slots(k_cache, slots, rotated_k)
    _write_slots(v_cache, slots, v)
    q = rotated[:, :num_heads].to(qkv.dtype)
    return as_multiplied(q, k_cache).to(q.dtype)


def _write_slots(cache: Tensor | Quantized, slots: Tensor, heads: Tensor) -> None:
    """Write heads [T, G, D] into slots of a cache, as they are or as codes and scales."""
    if isinstance(cache, Quantized):
        block_size = cache.codes.shape[1]
        at, rows = (slots // block_size, slots % block_size), quantize_rows(heads.flatten(0, 1))
        cache.codes[at], cache.scale[at] = rows.codes.view(heads.shape), rows.scale.view(heads.shape[:2])
    else:
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, heads.to(cache.dtype))


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
    *,
    decode: Callable[..., Tensor] | None = None,
    prompt: Callable[..., Tensor | None] | None = None,
) -> Tensor | Quantized:
    """Attend causally over the paged cache, for prefill chunks and decodes in one batch.

    y = softmax(q k^T * scale) v

    Over int8 keys a request of one row multiplies codes, of q as well, each head by the rules of `quantize_rows`. As
    neither scale of q k^T depends on the summed index, that is exact. One of several rows multiplies q, which
    `rope_and_cache` has rounded, by what the codes of keys and values stand for, rounded to q's dtype.

    Request b has the query rows query_starts[b] .. query_starts[b+1]-1. Row i of its n is at position
    context_lens[b] - n + i and sees the keys 0 .. that position. With a soft cap c the scores are
    c tanh(q k^T * scale / c).

    Args:
        q: [T, H, D] float.
        k_cache, v_cache: [num_blocks, block_size, G, D] float, or such int8 codes with a float32 scale
            [num_blocks, block_size, G]; block_size a power of two, a head's D elements contiguous. H is a multiple of
            G, and the query heads h*H/G .. (h+1)*H/G - 1 share key head h.
        block_tables: [B, max_blocks] int32; entries beyond the context are not read.
        query_starts: [B + 1] int32, rising.
        context_lens: [B] int32, keys of each request, this step's own included.
        is_decode: whether no request has more than one query row.
        scale: positive, usually D ** -0.5.
        quantize: None writes y in q's dtype; `ToInt8` writes codes and scale of y rounded to q's dtype.
        window: a row sees only the last window keys up to its own position, at least 1; None for all.
        soft_cap: positive bound of the scores; None for none.
        decode: attends single rows in place of `decode_attention`, with its arguments.
        prompt: attends the rows of a request with several, in place of `prompt_attention`, with its arguments; None if
            it does not take them.

    Returns:
        y [T, H * D]. Rows outside every request are not defined.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1; PagedAttention (arXiv 2309.06180); window: Longformer
    (arXiv 2004.05150), section 3.1; soft cap: Gemma 2 (arXiv 2408.00118), section 2.
    """
    decode = decode_attention if decode is None else decode
    if is_decode and len(context_lens) == len(q):
        y = decode(q, k_cache, v_cache, block_tables, context_lens, scale, window, soft_cap)
        return store(y, q.dtype, quantize)
    out = torch.empty_like(q).flatten(1)
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    lengths = [stop - start for start, stop in pairwise(starts)]
    # A single row always goes through the batched product, so that it rounds the same in every step.
    decodes = [b for b, length in enumerate(lengths) if length == 1]
    if decodes:
        rows = [starts[b] for b in decodes]
        out[rows] = decode(
            q[rows], k_cache, v_cache, block_tables[decodes], context_lens[decodes], scale, window, soft_cap
        )
    for b, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        if length < 2:
            continue
        here = slice(starts[b], starts[b] + length)
        args = q[here], k_cache, v_cache, block_tables[b], context, scale, window, soft_cap
        taken = None if prompt is None else prompt(*args)
        out[here] = prompt_attention(*args) if taken is None else taken
    return store(out, q.dtype, quantize)


def prompt_attention(
    q: Tensor,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    block_table: Tensor,
    context: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """`paged_attention` of rows q [n, H, D] of one request, the last of its `context` tokens: [n, H * D] float32."""
    first, num_keys = context - len(q), -(-context // TILE) * TILE
    keys, values = (
        _gather_blocks(cache, block_table[None], context, num_keys).to(q.dtype).float() for cache in (k_cache, v_cache)
    )
    out = torch.empty(len(q), q.shape[1] * q.shape[2], device=q.device)
    for start in range(first // TILE * TILE, context, TILE):
        stop, begin, end = start + TILE, max(start, first), min(start + TILE, context)
        here = slice(begin - first, end - first)
        tile = torch.zeros(TILE, *q.shape[1:], device=q.device)
        tile[begin - start : end - start] = q[here]
        mask = _mask(start, window, q.device)
        y = _attend(tile.transpose(0, 1)[None], keys[:, :, :stop], values[:, :, :stop], mask, scale, soft_cap)
        out[here] = y[0, :, begin - start : end - start].transpose(0, 1).flatten(1)
    return out


def as_multiplied(q: Tensor, k_cache: Tensor | Quantized) -> Tensor:
    """Queries [T, H, D]; over int8 keys what their codes stand for, in float32."""
    if not isinstance(k_cache, Quantized):
        return q
    rounded = quantize_rows(q.flatten(0, 1))
    return (rounded.codes * rounded.scale[:, None]).view(q.shape)


def decode_attention(
    q: Tensor,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """`paged_attention` where every request has one query row: one batched product over padded contexts."""
    block_size = (k_cache.codes if isinstance(k_cache, Quantized) else k_cache).shape[1]
    # Whole vectors, always masked: the order of a row's sum must not depend on the longest context.
    longest = -(-int(context_lens.max()) // VECTOR) * VECTOR
    positions = torch.arange(longest, device=q.device)
    # Past the end of a context its last key is read again: a slot never written may hold NaN, and 0 * NaN is NaN.
    inside = torch.minimum(positions, context_lens[:, None] - 1).clamp_(min=0)
    # By shift and mask, as block_size is a power of two: integer division is not vectorized.
    blocks = block_tables.gather(1, inside >> (block_size.bit_length() - 1))
    slots = blocks * block_size + (inside & (block_size - 1))
    keys, values = (_gather(cache, slots) for cache in (k_cache, v_cache))
    beyond = positions >= context_lens[:, None]
    if window is not None:
        beyond |= positions < context_lens[:, None] - window
    mask = torch.zeros(beyond.shape, device=q.device).masked_fill_(beyond, float("-inf"))[:, None, None]
    return (
        _attend(as_multiplied(q, k_cache).float()[:, :, None], keys, values, mask, scale, soft_cap)
        .flatten(1)
        .to(q.dtype)
    )


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """softmax(q k^T * scale) v, [B, H, rows, D]. mask: 0 where a row sees a key, else -inf."""
    if soft_cap is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    keys, values = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (keys, values))
    scores = torch.tanh(q @ keys.transpose(-1, -2) * (scale / soft_cap)) * soft_cap
    return (scores + mask).softmax(-1) @ values


def _mask(start: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys 0 .. start + TILE - 1 the rows at positions start .. start + TILE - 1 see, as `_attend` takes it."""
    longest = 1 << max(start, TILE).bit_length()
    mask = _diagonal(longest, device)[:, longest - start :]
    if window is None:
        return mask
    beyond = torch.ones(TILE, start + TILE, dtype=torch.bool, device=device).tril(start - window)
    return mask.masked_fill(beyond, float("-inf"))


@lru_cache(maxsize=8)
def _diagonal(longest: int, device: torch.device) -> Tensor:
    """The mask of a tile behind `longest` keys, whose last columns are those of a tile behind fewer."""
    # Kept for callers of either mode.
    with torch.inference_mode(False):
        mask = torch.zeros(TILE, longest + TILE, device=device)
        mask[:, longest:] = torch.full((TILE, TILE), float("-inf"), device=device).triu(1)
        return mask


def _gather_blocks(cache: Tensor | Quantized, block_tables: Tensor, num_tokens: int, size: int) -> Tensor:
    """The first num_tokens slots of each request's blocks, then zeros: [B, G, size, D] float32."""
    if isinstance(cache, Quantized):
        codes, scale = _gather_blocks(cache.codes, block_tables, num_tokens, size), cache.scale.unsqueeze(-1)
        return codes * _gather_blocks(scale, block_tables, num_tokens, size)
    block_size = cache.shape[1]
    num_blocks = -(-num_tokens // block_size)
    blocks = cache.index_select(0, block_tables[:, :num_blocks].reshape(-1))
    tokens = torch.zeros(len(block_tables), size, *cache.shape[2:], device=cache.device)
    tokens[:, :num_tokens] = blocks.view(len(block_tables), -1, *cache.shape[2:])[:, :num_tokens]
    return tokens.transpose(1, 2)


def _gather(cache: Tensor | Quantized, slots: Tensor) -> Tensor:
    """The keys or values in slots [B, N] of a cache: [B, G, N, D] float32."""
    if isinstance(cache, Quantized):
        scale = cache.scale.flatten(0, 1).index_select(0, slots.flatten())
        return _gather(cache.codes, slots) * scale.view(*slots.shape, -1, 1).transpose(1, 2)
    num_slots, head_shape = cache.shape[0] * cache.shape[1], cache.shape[2:]
    rows = cache.view(num_slots, -1).index_select(0, slots.flatten())
    return rows.view(*slots.shape, *head_shape).float().transpose(1, 2)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first R columns of x [T, heads, D] by cos_sin [T, R], pairing the two halves."""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    half = cos.shape[-1]
    low, high = x[..., :half], x[..., half : 2 * half]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, x[..., 2 * half :]), dim=-1)


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
    """`rope_and_cache` of a step's rows, then `paged_attention` of what it returns; their arguments are these."""
    where = rows.positions, rows.slots, cos_sin, k_cache, v_cache
    q = rope_and_cache(qkv, *where, num_heads, q_weight, k_weight, eps, sink)
    requests = rows.block_tables, rows.query_starts, rows.context_lens, rows.is_decode
    return paged_attention(q, k_cache, v_cache, *requests, scale, quantize, window, soft_cap)
