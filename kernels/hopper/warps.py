"""What the warps of a decode on Hopper hold: layouts, the state of each, their sums, and what they leave each other.

A state is, for each warp and query head, the largest score (in powers of two) and the sum of weights exp2(score -
largest), both [WARPS, HEADS], and values weighted by these, in two halves of the columns [WARPS, D / 2, HEADS]: of
floats the first half and the second, of int8 pairs the even columns and the odd ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "BY_LANE", "BY_WARP", "HEADS", "LOWEST", "MMA", "PLAIN_2", "ROWS", "WARPS",
    "add", "each", "nothing", "store_heads", "store_part", "sum_of_parts",
]  # fmt: skip

WARPS = gl.constexpr(4)
ROWS = gl.constexpr(16)
HEADS = gl.constexpr(8)
# The lowest float32, and finite: a warp may have no key, and -inf - -inf is NaN.
LOWEST = gl.constexpr(-3.4028234663852886e38)
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
# A number for each warp and lane, and for each warp.
BY_LANE = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))
BY_WARP = gl.constexpr(gl.SliceLayout(1, BY_LANE.value))
# Half of the columns of a head by 8 heads, when the warps meet.
BY_COLUMN = gl.constexpr(gl.BlockedLayout([1, 4, 1], [1, 16, 2], [1, 1, 4], [1, 2, 0]))
BY_HEAD = gl.constexpr(gl.SliceLayout(1, BY_COLUMN.value))
PLAIN_2 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
PLAIN_3 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0]))


@gluon.jit
def each(x, axes: gl.constexpr):
    """x with a dimension of 1 at each of these places."""
    for axis in gl.static_range(len(axes)):
        x = gl.expand_dims(x, axes[axis])
    return x


@gluon.jit
def nothing(C: gl.constexpr, BY_ROW: gl.constexpr):
    """The sum of no key for each warp; C: columns of a half."""
    zeros = gl.zeros([WARPS, C, HEADS], gl.float32, MMA)
    top = gl.full([WARPS, HEADS], LOWEST, gl.float32, BY_ROW)
    return top, gl.zeros([WARPS, HEADS], gl.float32, BY_ROW), zeros, zeros


@gluon.jit
def add(y, part, unit):
    """Add a split to those before it, for each warp; the split's weighted values are over unit [WARPS]."""
    y_top, y_total, y_low, y_high = y
    top, total, low, high = part
    new_top = gl.maximum(y_top, top)
    old, new = gl.exp2(y_top - new_top), gl.exp2(top - new_top)
    y_total = gl.fma(total, new, y_total * old)
    new *= each(gl.convert_layout(unit, gl.SliceLayout(1, new.type.layout)), (1,))
    old = each(gl.convert_layout(old, gl.SliceLayout(1, MMA)), (1,))
    new = each(gl.convert_layout(new, gl.SliceLayout(1, MMA)), (1,))
    return new_top, y_total, gl.fma(low, new, y_low * old), gl.fma(high, new, y_high * old)


@gluon.jit
def _joined(memory, half, tops, top):
    """The sum over the warps of weighted values, whose largest scores are in tops; top: the largest of all."""
    memory.store(half)
    y = gl.zeros([1, half.shape[1], HEADS], gl.float32, BY_COLUMN)
    for warp in gl.static_range(WARPS):
        weight = gl.exp2(tops.slice(warp, 1).load(BY_HEAD) - top)
        y = gl.fma(memory.slice(warp, 1).load(BY_COLUMN), each(weight, (1,)), y)
    return y


@gluon.jit
def _join(y):
    """One sum for all warps: that of weights [1, HEADS], and that of weighted values [1, D / 2, HEADS]."""
    top, total, low, high = y
    halves = gl.allocate_shared_memory(gl.float32, [WARPS, low.shape[1], HEADS], PLAIN_3)
    tops = gl.allocate_shared_memory(gl.float32, [WARPS, HEADS], PLAIN_2, top)
    totals = gl.allocate_shared_memory(gl.float32, [WARPS, HEADS], PLAIN_2, total)
    top = tops.slice(0, 1).load(BY_HEAD)
    for warp in gl.static_range(1, WARPS):
        top = gl.maximum(top, tops.slice(warp, 1).load(BY_HEAD))
    total = gl.zeros([1, HEADS], gl.float32, BY_HEAD)
    for warp in gl.static_range(WARPS):
        weight = gl.exp2(tops.slice(warp, 1).load(BY_HEAD) - top)
        total = gl.fma(totals.slice(warp, 1).load(BY_HEAD), weight, total)
    return total, _joined(halves, low, tops, top), _joined(halves, high, tops, top)


@gluon.jit
def _places(kv_head, layout: gl.constexpr, LAYOUT: gl.constexpr):
    """Where both halves of the columns of a key head's query heads are in a row [H * D], and which heads there are.

    layout: of [*, D / 2, HEADS].
    """
    C: gl.constexpr = LAYOUT.D // 2
    head = each(gl.arange(0, HEADS, gl.SliceLayout(0, gl.SliceLayout(0, layout))), (0, 0))
    column = each(gl.arange(0, C, gl.SliceLayout(1, gl.SliceLayout(0, layout))), (1, 0))
    first = (kv_head * LAYOUT.GROUP + head) * LAYOUT.D
    is_head = (head < LAYOUT.GROUP) & (column >= 0)
    # Pairs of int8 values were parted.
    if LAYOUT.V_SCALE is not None:
        low, high = first + 2 * column, first + 2 * column + 1
    else:
        low, high = first + column, first + C + column
    return low, high, is_head


@gluon.jit
def _part_places(parts, split, kv_head, BY_ROW: gl.constexpr, LAYOUT: gl.constexpr):
    """Pointers to what each warp left of a split, counted over all requests, for a key head.

    They are those of the first half of the columns, and of the largest scores; behind these are the second half, and
    each score's sum. With each, which heads there are.
    """
    D: gl.constexpr = LAYOUT.D
    GROUP: gl.constexpr = LAYOUT.GROUP
    warp = each(gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, MMA))), (1, 2))
    column = each(gl.arange(0, D // 2, gl.SliceLayout(1, gl.SliceLayout(0, MMA))), (1, 0))
    head = each(gl.arange(0, HEADS, gl.SliceLayout(0, gl.SliceLayout(0, MMA))), (0, 0))
    first = (split * WARPS * LAYOUT.G + kv_head) * GROUP
    y_ptrs = parts.y + first * D + (warp * (LAYOUT.G * D * GROUP) + column * GROUP + head)
    row_warp = each(gl.arange(0, WARPS, gl.SliceLayout(1, BY_ROW)), (1,))
    row_head = each(gl.arange(0, HEADS, gl.SliceLayout(0, BY_ROW)), (0,))
    sums_ptrs = parts.sums + 2 * first + 2 * (row_warp * (LAYOUT.G * GROUP) + row_head)
    return y_ptrs, (head < GROUP) & (column + warp >= 0), sums_ptrs, (row_head < GROUP) & (row_warp >= 0)


@gluon.jit
def store_part(part, unit, parts, split, kv_head, LAYOUT: gl.constexpr):
    """Leave a split for the last program; its weighted values are over unit [WARPS]."""
    top, total, low, high = part
    unit = each(gl.convert_layout(unit, gl.SliceLayout(1, gl.SliceLayout(2, MMA))), (1, 2))
    BY_ROW: gl.constexpr = top.type.layout
    y_ptrs, is_value, sums_ptrs, is_head = _part_places(parts, split, kv_head, BY_ROW, LAYOUT)
    gl.store(y_ptrs, low * unit, mask=is_value)
    gl.store(y_ptrs + LAYOUT.D // 2 * LAYOUT.GROUP, high * unit, mask=is_value)
    gl.store(sums_ptrs, top, mask=is_head)
    gl.store(sums_ptrs + 1, total, mask=is_head)


@gluon.jit
def _load_part(parts, split, is_there, kv_head, BY_ROW: gl.constexpr, LAYOUT: gl.constexpr):
    """What another program stored: not from the first cache. If it is not there, what adds nothing."""
    y_ptrs, is_value, sums_ptrs, is_head = _part_places(parts, split, kv_head, BY_ROW, LAYOUT)
    is_value, is_head = is_value & is_there, is_head & is_there
    high_ptrs = y_ptrs + LAYOUT.D // 2 * LAYOUT.GROUP
    low = gl.load(y_ptrs, mask=is_value, other=0.0, cache_modifier=".cg")
    high = gl.load(high_ptrs, mask=is_value, other=0.0, cache_modifier=".cg")
    top = gl.load(sums_ptrs, mask=is_head, other=LOWEST, cache_modifier=".cg")
    return top, gl.load(sums_ptrs + 1, mask=is_head, other=0.0, cache_modifier=".cg"), low, high


@gluon.jit
def sum_of_parts(parts, first, num_splits, kv_head, BY_ROW: gl.constexpr, LAYOUT: gl.constexpr):
    """The sum of a request's splits for each warp, in their order; four are loaded at once."""
    y_top, y_total, y_low, y_high = nothing(LAYOUT.D // 2, BY_ROW)
    unit = gl.full([WARPS], 1.0, gl.float32, gl.SliceLayout(1, BY_ROW))
    for nth in range(0, num_splits, 4):
        a = _load_part(parts, first + nth, True, kv_head, BY_ROW, LAYOUT)
        b = _load_part(parts, first + nth + 1, nth + 1 < num_splits, kv_head, BY_ROW, LAYOUT)
        c = _load_part(parts, first + nth + 2, nth + 2 < num_splits, kv_head, BY_ROW, LAYOUT)
        d = _load_part(parts, first + nth + 3, nth + 3 < num_splits, kv_head, BY_ROW, LAYOUT)
        y = add(add((y_top, y_total, y_low, y_high), a, unit), b, unit)
        y_top, y_total, y_low, y_high = add(add(y, c, unit), d, unit)
    return y_top, y_total, y_low, y_high


@gluon.jit
def store_heads(y, out_ptr, kv_head, context, LAYOUT: gl.constexpr):
    """Join the warps and write the heads of a token's row: 0 without a key, NaN if no score was above -infinity."""
    total, low, high = _join(y)
    inverse = each(1.0 / gl.where(context > 0, total, 1.0), (1,))
    low_at, high_at, is_head = _places(kv_head, BY_COLUMN, LAYOUT)
    gl.store(out_ptr + low_at, (low * inverse).to(out_ptr.dtype.element_ty), mask=is_head)
    gl.store(out_ptr + high_at, (high * inverse).to(out_ptr.dtype.element_ty), mask=is_head)
