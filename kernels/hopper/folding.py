"""What a tile of keys adds to the state of each warp of a decode on Hopper: scores, weights, and weighted values."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels.hopper.warps import HEADS, MMA, ROWS, WARPS, each
from kernels.paging import widen_pairs

__all__ = ["fold_tile", "fold_values", "upper"]


@gluon.jit
def upper(scores):
    """The first 8 of the 16 rows of scores [WARPS, 16, N]: the others are padding."""
    parts = gl.reshape(scores, [WARPS, 2, HEADS, scores.shape[2]])
    upper_and_lower = gl.split(gl.permute(parts, (0, 2, 3, 1)))
    return upper_and_lower[0]


@gluon.jit
def _halves(x):
    """An operand [WARPS, D, N] as two, of its first rows and of the others."""
    parts = gl.reshape(x, [WARPS, 2, x.shape[1] // 2, x.shape[2]])
    first, second = gl.split(gl.permute(parts, (0, 2, 3, 1)))
    layout: gl.constexpr = x.type.layout
    return gl.convert_layout(first, layout, assert_trivial=True), gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def _scores(q, k):
    """q k^T of 8 heads, [WARPS, HEADS, N]; q: two operands of half the columns each, for two chains half as long."""
    k_low, k_high = _halves(k)
    q_layout: gl.constexpr = gl.DotOperandLayout(0, MMA, k.type.layout.k_width)
    none = gl.zeros([WARPS, ROWS, k.shape[2]], gl.int32 if k.dtype == gl.int8 else gl.float32, MMA)
    q_low = gl.convert_layout(q[0], q_layout, assert_trivial=True)
    q_high = gl.convert_layout(q[1], q_layout, assert_trivial=True)
    return upper(mma_v2(q_low, k_low, none) + mma_v2(q_high, k_high, none))


@gluon.jit
def _unit_of(scale):
    """2^-15 times the power of two above a largest scale of at most 2^121; not above 0 for one that is not finite.

    Over it weights times scales are at most 2^15, in float16's range with 29 powers of two below.
    """
    bits = (scale.to(gl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    return bits.to(gl.float32, bitcast=True) * 2.0**-15


@gluon.jit
def _inverse_of(power):
    """1 / power, exact, for powers of two of 2^-125 to 2^126."""
    return (0x7F000000 - power.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)


@gluon.jit
def fold_tile(q, row_scale, state, rings, stage, keys, last, is_inside, IS_INT8: gl.constexpr):
    """Add a tile of keys of each warp, those from keys [WARPS] on, to its state. Returns what changed of it, and p.

    state: the largest score so far (in powers of two) and the sum of exp2(score - largest), [WARPS, HEADS]; and the
    unit [WARPS] of weighted values, that of the largest scale of values so far, 1 for floats. is_inside: whether the
    context reaches beyond all tiles.
    """
    top, total, unit = state
    BY_KEY: gl.constexpr = top.type.layout.parent
    N: gl.constexpr = rings[0].shape[2]
    k = rings[0].index(stage).permute((0, 2, 1)).load(gl.DotOperandLayout(1, MMA, 4 if IS_INT8 else 2))
    scores = _scores(q, k)
    if IS_INT8:
        scores = scores.to(gl.float32) * each(rings[2].index(stage).load(gl.SliceLayout(1, BY_KEY)), (1,))
    if not is_inside:
        seen = each(gl.convert_layout(last - keys, gl.SliceLayout(1, gl.SliceLayout(2, BY_KEY))), (1, 2))
        nth = each(gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, BY_KEY))), (0, 1))
        scores = gl.where(nth < seen, scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, axis=2) * row_scale)
    p = gl.exp2(scores * each(row_scale, (2,)) - each(new_top, (2,)))
    shrink = gl.exp2(top - new_top)
    total = total * shrink + gl.sum(p, axis=2)
    if IS_INT8:
        scales = rings[3].index(stage).load(gl.SliceLayout(1, BY_KEY))
        new_unit = gl.maximum(unit, _unit_of(gl.max(scales, axis=1)))
        inverse = _inverse_of(new_unit)
        p *= each(scales * each(inverse, (1,)), (1,))
        shrink *= each(gl.convert_layout(unit * inverse, gl.SliceLayout(1, top.type.layout)), (1,))
        unit = new_unit
    return new_top, total, unit, shrink, p


@gluon.jit
def fold_values(p, shrink, v, low, high, IS_INT8: gl.constexpr, TYPE: gl.constexpr):
    """Add values v [WARPS, columns, N] weighted by p to both halves of the columns, [WARPS, D / 2, HEADS]."""
    weights = gl.convert_layout(gl.permute(p.to(TYPE), (0, 2, 1)), gl.DotOperandLayout(1, MMA, 2))
    shrink = each(gl.convert_layout(shrink, gl.SliceLayout(1, MMA)), (1,))
    if IS_INT8:
        low_v, high_v = widen_pairs(v, TYPE)
    else:
        low_v, high_v = _halves(v)
    return mma_v2(low_v, weights, low * shrink), mma_v2(high_v, weights, high * shrink)
