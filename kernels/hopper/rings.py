"""Keys and values of a decode on Hopper: rings of tiles in shared memory, filled by asynchronous copies."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kernels.hopper.warps import BY_LANE, BY_WARP, PLAIN_2, WARPS, each

__all__ = ["FLOAT_KEYS", "blocks_of", "copy_first_tiles", "copy_tiles", "heads_of", "rings_of"]

FLOAT_KEYS = gl.constexpr(16)
"""Keys of a float tile, and fewest slots of a block."""


@gluon.jit
def _ring(dtype: gl.constexpr, STAGES: gl.constexpr, N: gl.constexpr, C: gl.constexpr):
    """Shared memory for STAGES tiles of each warp, whose rows no two threads of a load find in one bank."""
    VEC: gl.constexpr = 128 // dtype.primitive_bitwidth
    PIECES: gl.constexpr = C // VEC
    layout: gl.constexpr = gl.SwizzledSharedLayout(VEC, max(1, 8 // PIECES), min(8, PIECES), [2, 1, 0])
    return gl.allocate_shared_memory(dtype, [STAGES, WARPS, N, C], layout)


@gluon.jit
def rings_of(k_ptr, v_ptr, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory for keys and values, and for the scales of an int8 cache."""
    D: gl.constexpr = LAYOUT.D
    if LAYOUT.K_SCALE is None:
        k_ring = _ring(k_ptr.dtype.element_ty, STAGES, FLOAT_KEYS, D)
        return k_ring, _ring(v_ptr.dtype.element_ty, STAGES, FLOAT_KEYS, D)
    else:
        # Half the bytes for each key, so twice the keys.
        N: gl.constexpr = min(32, LAYOUT.BLOCK_SIZE)
        k_scales = gl.allocate_shared_memory(gl.float32, [STAGES, WARPS, N], PLAIN_2)
        v_scales = gl.allocate_shared_memory(gl.float32, [STAGES, WARPS, N], PLAIN_2)
        return _ring(gl.int8, STAGES, N, D), _ring(gl.int16, STAGES, N, D // 2), k_scales, v_scales


@gluon.jit
def heads_of(k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, kv_head, LAYOUT: gl.constexpr):
    """The keys and values of a key head, and the scales of both; int8 values in pairs."""
    k_ptr += kv_head * LAYOUT.K.HEAD
    v_ptr += kv_head * LAYOUT.V.HEAD
    if k_scale_ptr is None:
        return k_ptr, v_ptr
    else:
        k_scale_ptr += kv_head * LAYOUT.K_SCALE.HEAD
        v_scale_ptr += kv_head * LAYOUT.V_SCALE.HEAD
        return k_ptr, v_ptr.to(gl.pointer_type(gl.int16)), k_scale_ptr, v_scale_ptr


@gluon.jit
def blocks_of(table_ptr, keys, context, BLOCK_SIZE: gl.constexpr):
    return gl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < context, other=0)


@gluon.jit
def _copy(tile, ptr, at, left, SLOT: gl.constexpr, IS_STRICT: gl.constexpr):
    """Copy rows of a cache, SLOT elements apart, to a tile of each warp [WARPS, N, C]; at [WARPS]: their first element.

    left [WARPS]: how many rows there are. Beyond them 0 is written with IS_STRICT, else for whole tiles alone.
    """
    N: gl.constexpr = tile.shape[1]
    C: gl.constexpr = tile.shape[2]
    VEC: gl.constexpr = 128 // tile.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([1, 1, VEC], [1, 32 * VEC // C, C // VEC], [WARPS, 1, 1], [2, 1, 0])
    by_warp: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    rows = each(gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, layout))), (0, 2))
    columns = each(gl.arange(0, C, gl.SliceLayout(0, gl.SliceLayout(1, layout))), (0, 1))
    at = each(gl.convert_layout(at, by_warp, assert_trivial=True), (1, 2))
    left = each(gl.convert_layout(left, by_warp, assert_trivial=True), (1, 2))
    async_copy.async_copy_global_to_shared(
        tile, (ptr + at) + (rows * SLOT + columns), mask=left > (rows if IS_STRICT else 0)
    )


@gluon.jit
def _copy_scales(tile, ptr, blocks, keys, last, STRIDES: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Copy the scales of a tile of each warp [WARPS, N]; 0 from `last` on, where memory may hold NaN."""
    keys = keys[:, None] + gl.arange(0, tile.shape[1], gl.SliceLayout(0, BY_LANE))[None, :]
    at = (blocks * STRIDES.BLOCK)[:, None] + (keys % BLOCK_SIZE) * STRIDES.SLOT
    async_copy.async_copy_global_to_shared(tile, ptr + at, mask=keys < last)


@gluon.jit
def copy_tiles(rings, stage, caches, blocks, keys, last, LAYOUT: gl.constexpr):
    """Copy the tile of each warp that starts at keys [WARPS], which are in these blocks, into a stage."""
    K: gl.constexpr = LAYOUT.K
    V: gl.constexpr = LAYOUT.V
    # int8 values go in pairs. A slot behind the context may hold NaN, and 0 times NaN is NaN.
    IS_FLOAT: gl.constexpr = LAYOUT.V_SCALE is None
    PER: gl.constexpr = 1 if IS_FLOAT else 2
    inside, left = keys % LAYOUT.BLOCK_SIZE, last - keys
    blocks = blocks.to(gl.int64)
    _copy(rings[0].index(stage), caches[0], blocks * K.BLOCK + inside * K.SLOT, left, K.SLOT, False)
    _copy(rings[1].index(stage), caches[1], (blocks * V.BLOCK + inside * V.SLOT) // PER, left, V.SLOT // PER, IS_FLOAT)
    if not IS_FLOAT:
        K_SCALE: gl.constexpr = LAYOUT.K_SCALE
        V_SCALE: gl.constexpr = LAYOUT.V_SCALE
        _copy_scales(rings[2].index(stage), caches[2], blocks, keys, last, K_SCALE, LAYOUT.BLOCK_SIZE)
        _copy_scales(rings[3].index(stage), caches[3], blocks, keys, last, V_SCALE, LAYOUT.BLOCK_SIZE)
    async_copy.commit_group()


@gluon.jit
def copy_first_tiles(rings, caches, table_ptr, first, last, LAYOUT: gl.constexpr):
    """Copy the first tiles, into all stages but the last."""
    STAGES: gl.constexpr = rings[0].shape[0]
    N: gl.constexpr = rings[0].shape[2]
    for stage in gl.static_range(STAGES - 1):
        keys = first + (stage * WARPS + gl.arange(0, WARPS, BY_WARP)) * N
        copy_tiles(rings, stage, caches, blocks_of(table_ptr, keys, last, LAYOUT.BLOCK_SIZE), keys, last, LAYOUT)
