"""Rotary embedding of queries and keys, and the write of keys and values into the paged cache, in one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.launching import MAX_PLANS, Plan, cdiv
from kernels.paging import Layout, codes_of, key_offsets, paged_layout, rounded_queries, scale_of
from kernels.quantize import magnitude, to_codes, to_scale
from kernels.quantized import Quantized

__all__ = ["Rotation", "Turn", "rope_and_cache", "rotation_of", "turned_heads", "write_heads"]

HEADS_PER_PROGRAM = 8


class Rotation(NamedTuple):
    """The operands of `rope_and_cache` beside qkv and the caches. eps is an argument of its own, as all numbers are."""

    positions: Tensor
    slots: Tensor
    cos_sin: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    sink: Tensor | None


@dataclass(frozen=True, slots=True)
class Turn:
    """What a rotation is compiled for: the first R columns of a head are turned, a sink has SINKS rows."""

    R: int
    SINKS: int


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
    """Rotate queries and keys by their positions, write keys and values into the cache. See reference.rope_and_cache.

    Raises:
        ValueError: qkv's or sink's width is not (H + 2G) D, sink has another dtype or is not contiguous, H is not a
            multiple of G, block_size is not a power of two, a cache's heads are not contiguous, or only one of the two
            weights is given.
    """
    rotation, turn = rotation_of(qkv, positions, slots, cos_sin, codes_of(k_cache), num_heads, q_weight, k_weight, sink)
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    T, (num_kv_heads, head_size) = qkv.shape[0], codes_of(k_cache).shape[-2:]
    q = torch.empty((T, num_heads, head_size), dtype=qkv.dtype, device=qkv.device)
    plan = _plan(paged_layout(num_heads, k_cache, v_cache), turn, starts_early(q.device, T))
    plan.launch(
        (T, cdiv(num_heads + 2 * num_kv_heads, HEADS_PER_PROGRAM), 1), qkv, rotation, q, codes_of(k_cache),
        codes_of(v_cache), scale_of(k_cache), scale_of(v_cache), qkv.stride(0), eps,
    )  # fmt: skip
    return q


def rotation_of(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    sink: Tensor | None = None,
) -> tuple[Rotation, Turn]:
    """The operands of a rotation and what it is compiled for. k_cache: floats or codes.

    Raises:
        ValueError: as `rope_and_cache`, but for the cache's layout.
    """
    if (q_weight is None) != (k_weight is None):
        raise ValueError("queries and keys are normed both or neither: give q_weight and k_weight, or none")
    num_kv_heads, head_size = k_cache.shape[-2:]
    all_heads = num_heads + 2 * num_kv_heads
    if qkv.shape[1] != all_heads * head_size:
        raise ValueError(
            f"qkv has {qkv.shape[1]} columns; {all_heads} heads of {head_size} need {all_heads * head_size}"
        )
    if sink is not None and (sink.shape[1:], sink.dtype, sink.is_contiguous()) != (qkv.shape[1:], qkv.dtype, True):
        raise ValueError(
            f"sink is {list(sink.shape)} {sink.dtype}; give contiguous rows like those of qkv, {qkv.shape[1]} columns "
            f"of {qkv.dtype}"
        )
    turn = Turn(cos_sin.shape[1], 0 if sink is None else len(sink))
    return Rotation(positions, slots, cos_sin, q_weight, k_weight, sink), turn


@lru_cache(maxsize=MAX_PLANS)
def _plan(layout: Layout, turn: Turn, is_early: bool) -> Plan:
    return Plan(
        _rope_and_cache_kernel, LAYOUT=layout, TURN=turn, HEADS=HEADS_PER_PROGRAM,
        DEPENDENT=is_early, launch_pdl=is_early,
    )  # fmt: skip


@triton.jit
def write_heads(y, cache_ptr, scale_ptr, slot, head, columns, mask, STRIDES: tl.constexpr, SCALE: tl.constexpr,
                LAYOUT: tl.constexpr):  # fmt: skip
    """Write float32 heads y [HEADS, BLOCK_D] of one token into its slot, as floats or as codes and scales."""
    block, inside = slot // LAYOUT.BLOCK_SIZE, slot % LAYOUT.BLOCK_SIZE
    ptrs = cache_ptr + key_offsets(block, inside, STRIDES, True) + head[:, None] * STRIDES.HEAD + columns[None, :]
    if scale_ptr is None:
        tl.store(ptrs, y.to(cache_ptr.dtype.element_ty), mask=mask)
    else:
        scale = to_scale(tl.max(magnitude(y), axis=1))
        tl.store(ptrs, to_codes(y, scale[:, None]), mask=mask)
        is_head = tl.max(mask.to(tl.int32), axis=1) > 0
        tl.store(scale_ptr + key_offsets(block, inside, SCALE, True) + head * SCALE.HEAD, scale, mask=is_head)


@triton.jit
def _head_weight(q_weight_ptr, k_weight_ptr, columns, mask, is_query, is_key):
    """The norm's weight [HEADS, BLOCK_D] of each head, float32."""
    q_weight = tl.load(q_weight_ptr + columns[None, :], mask=mask[None, :] & is_query, other=0.0).to(tl.float32)
    return q_weight + tl.load(k_weight_ptr + columns[None, :], mask=mask[None, :] & is_key, other=0.0).to(tl.float32)


@triton.jit
def turned_heads(
    qkv_ptr, turn, token, head, columns, is_head, stride_qkv, eps, LAYOUT: tl.constexpr, TURN: tl.constexpr
):
    """Heads of one token, of its H + 2G, as float32 [HEADS, BLOCK_D]: queries and keys normed and turned.

    head [HEADS]: which; columns [BLOCK_D]: 0 and up. Both are in the layout that the caller wants. Each value has the
    same bits in every kernel that calls this, but for a norm's: its sum follows the layout.
    """
    D: tl.constexpr = LAYOUT.D
    G: tl.constexpr = LAYOUT.G
    R: tl.constexpr = TURN.R
    H: tl.constexpr = LAYOUT.GROUP * G
    heads = head[:, None]
    is_here = is_head[:, None] & (columns < D)[None, :]

    # Each column also loads its partner: a load from the L1 cache instead of a shuffle of the halves.
    is_low, is_turned = columns < R // 2, columns < R
    partners = tl.where(is_low, columns + R // 2, columns - R // 2)
    angles = tl.where(is_low, columns, columns - R // 2)
    position = tl.load(turn.positions + token).to(tl.int64)
    angles_ptr = turn.cos_sin + position * R
    cos = tl.load(angles_ptr + angles, mask=is_turned, other=1.0)
    sin = tl.load(angles_ptr + R // 2 + angles, mask=is_turned, other=0.0)
    sin = tl.where(is_low, -sin, sin)

    row_ptr = qkv_ptr + token * stride_qkv
    if turn.sink is not None:
        row_ptr = tl.where(position < TURN.SINKS, turn.sink + position * (H + 2 * G) * D, row_ptr)
    x = tl.load(row_ptr + heads * D + columns[None, :], mask=is_here, other=0.0)
    turns = is_here & is_turned[None, :] & (heads < H + G)
    partner = tl.load(row_ptr + heads * D + partners[None, :], mask=turns, other=0.0)
    x, partner = x.to(tl.float32), partner.to(tl.float32)
    if turn.q_weight is not None:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        is_query, is_key = heads < H, (heads >= H) & (heads < H + G)
        weight = _head_weight(turn.q_weight, turn.k_weight, columns, columns < D, is_query, is_key)
        x = tl.where(is_query | is_key, x * inverse * weight, x)
        partner *= inverse * _head_weight(turn.q_weight, turn.k_weight, partners, is_turned, is_query, is_key)
    # Fused here, since a compiler may fuse either product with the sum.
    return tl.where(turns, tl.fma(x, cos[None, :], partner * sin[None, :]), x)


@triton.jit
def _rope_and_cache_kernel(
    qkv_ptr,
    turn,
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    stride_qkv,
    eps,
    LAYOUT: tl.constexpr,
    TURN: tl.constexpr,
    HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One token, HEADS of its H + 2G heads."""
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    D: tl.constexpr = LAYOUT.D
    G: tl.constexpr = LAYOUT.G
    H: tl.constexpr = LAYOUT.GROUP * G
    K: tl.constexpr = LAYOUT.K
    V: tl.constexpr = LAYOUT.V
    K_SCALE: tl.constexpr = LAYOUT.K_SCALE
    V_SCALE: tl.constexpr = LAYOUT.V_SCALE
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    head = first + tl.arange(0, HEADS)
    heads, columns = head[:, None], tl.arange(0, LAYOUT.BLOCK_D)
    is_head = head < H + 2 * G
    y = turned_heads(qkv_ptr, turn, token, head, columns, is_head, stride_qkv, eps, LAYOUT, TURN)

    is_here = is_head[:, None] & (columns < D)[None, :]
    at = token * H * D + heads * D + columns[None, :]
    q = rounded_queries(y.to(q_ptr.dtype.element_ty), k_scale_ptr is not None)
    tl.store(q_ptr + at, q, mask=is_here & (heads < H))
    slot = tl.load(turn.slots + token)
    is_written = is_here & (slot >= 0)
    if (first + HEADS > H) & (first < H + G):
        mask = is_written & (heads >= H) & (heads < H + G)
        write_heads(y, k_ptr, k_scale_ptr, slot, head - H, columns, mask, K, K_SCALE, LAYOUT)
    if first + HEADS > H + G:
        mask = is_written & (heads >= H + G)
        write_heads(y, v_ptr, v_scale_ptr, slot, head - H - G, columns, mask, V, V_SCALE, LAYOUT)
