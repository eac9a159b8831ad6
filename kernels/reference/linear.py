"""The int8 products: exact integer sums, then scales, bias, gate and residual."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cpu.product import int8_product
from kernels.quantized import Quantized, ToInt8, group_size_of
from kernels.reference.common import ROWS_AT_ONCE, joined, row_slices, split_outliers, store

MAX_DEPTH = (2**31 - 1) // (128 * 128)


def int8_matmul(x_q: Tensor, weight_q: Tensor) -> Tensor:
    """Multiply int8 by int8 exactly: accumulator [T, N] int32 = x_q [T, K] @ weight_q [N, K]^T.

    Raises:
        ValueError: K is above 131,071, where 128 * 128 * K no longer fits in int32.
    """
    require_depth(x_q)
    return int8_product(x_q, weight_q)


def require_depth(x_q: Tensor) -> None:
    """Raise ValueError for a K above `MAX_DEPTH`."""
    if x_q.shape[-1] > MAX_DEPTH:
        raise ValueError(f"K = {x_q.shape[-1]} can overflow the int32 accumulator; the limit is {MAX_DEPTH}")


def int8_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Apply a W8A8 Linear: one int8 GEMM, both scales applied after the sum.

    acc = x_q @ weight_q^T  (int32)        y_tn = acc_tn * x_scale_t * weight_scale_n + bias_n + residual_tn

    Neither scale depends on the summed index k, so the sum is one integer product.

    Args:
        x: codes [T, K], scale [T] or [1].
        weight_q: [N, K] int8, rows contiguous.
        weight_scale: float32 [N] (per output channel) or [1] (per tensor).
        bias: [N] float or None.
        residual: [T, N] float or None.
        out_dtype: float16, bfloat16 or float32; of y.

    Returns:
        y [T, N].

    Raises:
        ValueError: K is above `MAX_DEPTH`.

    Source: SmoothQuant (arXiv 2211.10438), equation 2.
    """
    acc = int8_matmul(x.codes, weight_q)
    if len(acc) <= ROWS_AT_ONCE:
        return _finish(acc, x.scale, weight_scale, bias, residual, out_dtype)
    x_scale, parts = x.scale.expand(len(acc)), []
    for rows in row_slices(len(acc)):
        added = None if residual is None else residual[rows]
        parts.append(_finish(acc[rows], x_scale[rows], weight_scale, bias, added, out_dtype))
    return torch.cat(parts)


def int8_group_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Apply an int8 Linear whose weights have one scale per row and group g of neighbouring columns.

    y_tn = x_scale_t * sum_g weight_scale_ng * (sum_{k in g} x_q_tk * weight_q_nk) + bias_n + residual_tn

    The inner sums are int32 products; they are scaled and added in float32, in the order of g.

    Args:
        x: codes [T, K], scale [T] or [1].
        weight_q: [N, K] int8, rows contiguous.
        weight_scale: float32 [N, K / group size], the group size a power of two from 32.
        bias: [N] float or None.
        residual: [T, N] float or None.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        y [T, N].

    Raises:
        ValueError: weight_scale is not of a shape above.

    Source: ZeroQuant (arXiv 2206.01861), section 4.1: group-wise weights, token-wise activations.
    """
    group_size, scales = group_size_of(weight_q, weight_scale), weight_scale.t().contiguous()
    x_scale, one = x.scale.expand(len(x.codes)), x.scale.new_ones(1)
    parts = []
    for rows in row_slices(max(1, len(x.codes))):
        acc = _sum_groups(x.codes[rows], weight_q, scales, group_size)
        added = None if residual is None else residual[rows]
        parts.append(_finish(acc, x_scale[rows], one, bias, added, out_dtype))
    return torch.cat(parts)


def int8_outlier_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    threshold: float = 6.0,
) -> Tensor:
    """Apply a Linear in int8, and in float for the input columns that hold an outlier.

    O = {k : max_t |x_tk| >= threshold}
    y_tn = int8_linear(x without O)_tn + weight_scale_n * sum_{k in O} x_tk * weight_q_nk

    The summed dimension k is split: columns in O are multiplied in float for every row, all others in int8, with row
    scales found without O.

    Args:
        x: [T, K] float, any strides.
        weight_q: [N, K] int8, rows contiguous. The float part uses it too: no float weight is kept.
        weight_scale: float32 [N] or [1].
        bias: [N] float or None.
        residual: [T, N] float or None.
        out_dtype: float16, bfloat16 or float32; of y. The int8 part is rounded to it before the float part is added.
        threshold: positive, in x's units. NaN counts as an outlier.

    Returns:
        y [T, N]. A row depends on its batch, which determines O.

    Source: LLM.int8() (arXiv 2208.07339), section 3.2 and equation 8.
    """
    x_q, (columns, count) = split_outliers(x, threshold)
    y = int8_linear(x_q, weight_q, weight_scale, bias, residual, out_dtype)
    found = columns[: int(count)]
    if not len(found):
        return y
    outliers = x.index_select(1, found).float() @ weight_q.index_select(1, found).float().t()
    return outliers.mul_(weight_scale).add_(y).to(out_dtype)


def int8_gated_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    quantize: ToInt8 | None = None,
) -> Tensor | Quantized:
    """Apply a W8A8 Linear whose outputs are pairs of gate and up, and gate each up by SiLU of its gate.

    z = int8_linear(x, weight_q, weight_scale, bias), float32        y_tf = silu(z_t,2f) * z_t,2f+1

    Args:
        x, weight_q, weight_scale, bias: as `int8_linear`; row 2f of weight_q is gate f, row 2f + 1 is up f.
        out_dtype: of y [T, N / 2].
        quantize: None writes y; `ToInt8` writes codes and scale of y as rounded to out_dtype.

    Source: GLU variants (arXiv 2002.05202), SwiGLU; fusion after ZeroQuant (arXiv 2206.01861), section 4.3.
    """
    z = int8_linear(x, weight_q, weight_scale, bias, out_dtype=torch.float32)
    parts = [z[rows] for rows in row_slices(max(1, len(z)))]
    gated = [(F.silu(part[:, ::2]) * part[:, 1::2]).to(out_dtype) for part in parts]
    return joined([store(y, out_dtype, quantize) for y in gated])


def _sum_groups(x_q: Tensor, weight_q: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """sum_g (x_q weight_q^T over the columns of group g) * scales[g], float32 [T, N], in the order of g.

    Each group is one int8 product over views of its columns: with copies it takes 1.5 times as long at one token, twice
    as long at 128 (K = 576 and 1536, 9 to 12 groups).
    """
    acc = scales.new_zeros(len(x_q), len(weight_q))
    for group, scale in enumerate(scales):
        columns = slice(group * group_size, (group + 1) * group_size)
        acc.addcmul_(int8_product(x_q[:, columns], weight_q[:, columns]), scale)
    return acc


def _finish(
    acc: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue of `int8_linear` on the accumulator [T, N]."""
    y = acc * weight_scale
    y.mul_(x_scale.unsqueeze(-1))
    if bias is not None:
        y.add_(bias)
    if residual is not None:
        y.add_(residual)
    return y.to(out_dtype)
