"""Rotary embedding of queries and keys, and the write of keys and values into the paged cache, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rope_and_cache"]

HEADS_PER_PROGRAM = 8


def rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
) -> Tensor:
    """Rotate queries and keys by their positions; write keys and values into the cache; `reference.rope_and_cache`.

    For i < R/2, with c, s = cos_sin[position, i], cos_sin[position, R/2 + i]:
        out_i = x_i c - x_{i+R/2} s        out_{i+R/2} = x_{i+R/2} c + x_i s        (columns from R on unchanged)

    Args:
        qkv: [T, (H + 2G) D] float: queries, then keys, then values, head by head.
        positions: [T] int32, row of cos_sin.
        slots: [T] int32, block * block_size + offset; -1 writes nothing (a padding row).
        cos_sin: [P, R] float32, contiguous, R even and at most D.
        k_cache, v_cache: [num_blocks, block_size, G, D], written in place; slots evenly spaced, [G, D] contiguous.
        num_heads: H.

    Returns:
        q [T, H, D] in qkv's dtype, rotated.

    Raises:
        ValueError: qkv's width is not (H + 2G) D, or a cache does not have evenly spaced slots.

    Source: RoFormer (arXiv 2104.09864), equation 34, with halves instead of neighbours paired; PagedAttention
    (arXiv 2309.06180).
    """
    T = qkv.shape[0]
    num_kv_heads, head_size = k_cache.shape[-2:]
    all_heads = num_heads + 2 * num_kv_heads
    if qkv.shape[1] != all_heads * head_size:
        raise ValueError(
            f"qkv has {qkv.shape[1]} columns; {all_heads} heads of {head_size} need {all_heads * head_size}"
        )
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    q = torch.empty((T, num_heads, head_size), dtype=qkv.dtype, device=qkv.device)
    _rope_and_cache_kernel[(T, triton.cdiv(all_heads, HEADS_PER_PROGRAM))](
        qkv, positions, slots, cos_sin, q, k_cache, v_cache, qkv.stride(0), slot_stride(k_cache), slot_stride(v_cache),
        num_heads, num_kv_heads, R=cos_sin.shape[1], D=head_size, BLOCK_D=triton.next_power_of_2(head_size),
        HEADS=HEADS_PER_PROGRAM,
    )  # fmt: skip
    return q


def slot_stride(cache: Tensor) -> int:
    """Elements from one slot of a paged cache to the next.

    Raises:
        ValueError: the slots are not evenly spaced across blocks, or a slot's heads are not contiguous.
    """
    _, block_size, _, head_size = cache.shape
    per_block, per_slot, per_head, per_element = cache.stride()
    if per_block != block_size * per_slot or per_head != head_size or per_element != 1:
        raise ValueError(f"a cache of shape {tuple(cache.shape)} cannot have strides {cache.stride()}")
    return per_slot


@triton.jit
def _rope_and_cache_kernel(
    qkv_ptr,
    positions_ptr,
    slots_ptr,
    cos_sin_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    stride_qkv,
    stride_k,
    stride_v,
    H: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One token, HEADS of its H + 2G heads."""
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    columns = tl.arange(0, BLOCK_D)
    at = heads * D + columns[None, :]
    is_here = (heads < H + 2 * G) & (columns < D)[None, :]

    # Each column reads its partner too: one load from the L1 cache instead of a shuffle of halves.
    is_low, is_turned = columns < R // 2, columns < R
    partners = tl.where(is_low, columns + R // 2, columns - R // 2)
    angles = tl.where(is_low, columns, columns - R // 2)
    cos_sin_ptr += tl.load(positions_ptr + token).to(tl.int64) * R
    cos = tl.load(cos_sin_ptr + angles, mask=is_turned, other=1.0)
    sin = tl.load(cos_sin_ptr + R // 2 + angles, mask=is_turned, other=0.0)
    sin = tl.where(is_low, -sin, sin)

    row_ptr = qkv_ptr + token * stride_qkv
    x = tl.load(row_ptr + at, mask=is_here, other=0.0)
    turns = is_here & is_turned[None, :] & (heads < H + G)
    partner = tl.load(row_ptr + heads * D + partners[None, :], mask=turns, other=0.0)
    turned = x.to(tl.float32) * cos[None, :] + partner.to(tl.float32) * sin[None, :]
    y = tl.where(turns, turned, x.to(tl.float32))

    slot = tl.load(slots_ptr + token).to(tl.int64)
    is_k, is_v = (heads >= H) & (heads < H + G), heads >= H + G
    tl.store(q_ptr + token * H * D + at, y.to(q_ptr.dtype.element_ty), mask=is_here & (heads < H))
    k_ptrs = k_cache_ptr + slot * stride_k + at - H * D
    tl.store(k_ptrs, y.to(k_cache_ptr.dtype.element_ty), mask=is_here & is_k & (slot >= 0))
    v_ptrs = v_cache_ptr + slot * stride_v + at - (H + G) * D
    tl.store(v_ptrs, y.to(v_cache_ptr.dtype.element_ty), mask=is_here & is_v & (slot >= 0))
