"""What the kernels of decodes share: their operands, the write of a new key, and who comes last."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.paging import Layout
from kernels.rope import Rotation, Turn, turned_heads, write_heads

__all__ = ["Operands", "Requests", "is_last", "write_new_key"]


class Requests(NamedTuple):
    """Where the requests' rows and keys are."""

    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor


class Operands(NamedTuple):
    """The operands of attention; `scale` includes log2(e), since the softmax is computed in powers of two.

    arrivals: int32 zeros [B, G], or None.
    rotation: q [T, (H + 2G) * D] is queries, keys and values then, still to be rotated and written to the cache.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    requests: Requests
    scale: float
    layout: Layout
    arrivals: Tensor | None = None
    rotation: Rotation | None = None
    turn: Turn | None = None


@triton.jit
def is_last(arrivals_ptr, count):
    """Whether this program is the last of count to come here. It then sees what the others have written."""
    tl.debug_barrier()
    is_last = count <= 1
    if count > 1:
        is_last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == count - 1
        tl.store(arrivals_ptr, 0, mask=is_last)
    return is_last


@triton.jit
def write_new_key(qkv_ptr, rotation, token, caches, kv_head, both, columns, LAYOUT: tl.constexpr, TURN: tl.constexpr):
    """Write a token's key, turned, and its value into its slot, and let the program's other threads see them.

    caches: keys, values and the scales of both.   both: 0 and 1.   columns: 0 .. BLOCK_D - 1.
    """
    G: tl.constexpr = LAYOUT.G
    H: tl.constexpr = LAYOUT.GROUP * G
    K: tl.constexpr = LAYOUT.K
    V: tl.constexpr = LAYOUT.V
    K_SCALE: tl.constexpr = LAYOUT.K_SCALE
    V_SCALE: tl.constexpr = LAYOUT.V_SCALE
    head = H + kv_head + both * G
    y = turned_heads(qkv_ptr, rotation, token, head, columns, both < 2, (H + 2 * G) * LAYOUT.D, 0.0, LAYOUT, TURN)
    slot = tl.load(rotation.slots + token)
    is_written = (slot >= 0) & (columns < LAYOUT.D)[None, :]
    is_key, is_value = is_written & (both == 0)[:, None], is_written & (both == 1)[:, None]
    write_heads(y, caches[0], caches[2], slot, head - H, columns, is_key, K, K_SCALE, LAYOUT)
    write_heads(y, caches[1], caches[3], slot, head - H - G, columns, is_value, V, V_SCALE, LAYOUT)
    tl.debug_barrier()
