"""Every op of the dataflow in plain torch: the specification, the oracle of the tests, and the CPU backend.

Shapes: T tokens, B requests, N out, K in, H query heads, G key/value heads, D head size. All arithmetic between the
load and the store of an op is float32; only the stored result is rounded to the dtype named. The int8 product is a
real int8 x int8 -> int32 product (`torch._int_mm`), never a float one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.quantized import BLOCK, CODE_MAX, TINY, Outliers, Quantized, ToInt8, group_size_of, require_scale

# MKL may otherwise sum in an order that depends on where its operands lie in memory, and the same row would round
# differently alone and in a batch. It reads this at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__all__ = [
    "gelu",
    "gelu_mul",
    "int8_gated_linear",
    "int8_group_linear",
    "int8_linear",
    "int8_matmul",
    "int8_outlier_linear",
    "layer_norm",
    "paged_attention",
    "quantize_blocks",
    "quantize_rows",
    "quantize_tensor",
    "relu",
    "rms_norm",
    "rope_and_cache",
    "silu_mul",
    "split_outliers",
]


def quantize_rows(x: Tensor) -> Quantized:
    """Round each row of x to int8 with its own scale.

    scale_t = max_k |x_tk| / 127        codes = rint(x / scale)        x ~ codes * scale

    Args:
        x: [T, K] float, any strides. A row whose absmax is below 2**-100 gets scale 1 and codes 0. A row that holds
            NaN or infinity gets a scale that is not finite, so that no fault is hidden by rounding.

    Returns:
        codes [T, K] int8 in -127..127 (ties to even) and scale [T] float32.

    Source: ZeroQuant (arXiv 2206.01861), token-wise quantization.
    """
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    scale = absmax / CODE_MAX
    if absmax.numel() and absmax.min().item() < TINY:
        is_zero = absmax < TINY
        x = x.masked_fill(is_zero, 0.0)
        scale.masked_fill_(is_zero, 1.0)
    return Quantized((x / scale).round_().to(torch.int8), scale.squeeze(-1))


def quantize_blocks(x: Tensor) -> Quantized:
    """Round each 128 columns of each row of x to int8 with a scale of their own, by the rules of `quantize_rows`.

    scale_tp = max_k in block p |x_tk| / 127        codes = rint(x / scale)

    Args:
        x: [T, K] float, any strides. The last block holds what is left of K.

    Returns:
        codes [T, K] int8 in -127..127 (ties to even) and scale [T, ceil(K / 128)] float32.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2: tiles of 1 x 128, there for FP8.
    """
    T, K = x.shape
    num_blocks = -(-K // BLOCK)
    codes, scale = quantize_rows(F.pad(x.float(), (0, -K % BLOCK)).view(T * num_blocks, BLOCK))
    return Quantized(codes.view(T, num_blocks * BLOCK)[:, :K].contiguous(), scale.view(T, num_blocks))


def quantize_tensor(x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Quantized:
    """Round all of x to int8 with one scale, given or found.

    scale = max |x| / 127 unless given        codes = clamp(rint(x / scale), -127, 127)
    with a zero point                         codes = clamp(rint(x / scale) + zero_point, -128, 127)

    Args:
        x: [T, K] float, any strides.
        scale: float32 [1], positive: a static scale. None finds the tensor's own, by the rules of `quantize_rows`.
        zero_point: int8 [1], the code of 0, or None; only with a scale that is given. Then
            x ~ (codes - zero_point) * scale, and what multiplies the codes has to take the zero point off.

    Returns:
        codes [T, K] int8 (ties to even), in -127..127 where there is no zero point, and scale [1] float32.

    Raises:
        ValueError: a zero point without a scale.

    Source: SmoothQuant (arXiv 2211.10438), table 2: per-tensor static (O3) and dynamic (O2) activations; the zero
    point: Jacob et al. (arXiv 1712.05877), equation 1.
    """
    require_scale(scale, zero_point)
    x = x.float()
    if scale is None:
        absmax = x.abs().amax().reshape(1)
        scale = (absmax / CODE_MAX).masked_fill_(absmax < TINY, 1.0)
    codes = (x / scale).round_()
    codes = codes.clamp_(-CODE_MAX, CODE_MAX) if zero_point is None else codes.add_(zero_point).clamp_(-128, CODE_MAX)
    return Quantized(codes.to(torch.int8), scale)


def split_outliers(x: Tensor, threshold: float) -> tuple[Quantized, Outliers]:
    """Round each row of x to int8 without the columns that hold an outlier, and list these.

    O = {k : max_t |x_tk| >= threshold}        scale_t = max_{k not in O} |x_tk| / 127        codes = 0 in O

    Args:
        x: [T, K] float, any strides.
        threshold: positive, in x's units. NaN counts as an outlier.

    Returns:
        codes [T, K] int8 and scale [T], by the rules of `quantize_rows`, and O.

    Source: LLM.int8() (arXiv 2208.07339), section 3.2.
    """
    # Written so that NaN is one.
    is_outlier = ~(x.abs() < threshold).all(0)
    columns = is_outlier.nonzero().squeeze(-1).to(torch.int32)
    count = torch.tensor([len(columns)], dtype=torch.int32, device=x.device)
    listed = Outliers(F.pad(columns, (0, len(is_outlier) - len(columns))), count)
    return quantize_rows(x.masked_fill(is_outlier, 0.0)), listed


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Add the residual, then scale each row to unit root mean square.

    h = x + residual        y = h / sqrt(mean_k h^2 + eps) * weight

    Args:
        x: [T, K] float.
        weight: [K] float.
        eps: added to the mean square.
        residual: [T, K] of x's dtype, or None for h = x. h is rounded to x's dtype before the norm reads it.
        quantize: None writes y in x's dtype; `ToInt8` writes codes and scale of the float32 y.

    Returns:
        y, and h [T, K] in x's dtype (x itself where there is no residual).

    Source: RMSNorm (arXiv 1910.07467), equation 4; fusion after ZeroQuant, section 4.3.
    """
    summed = x if residual is None else x + residual
    h = summed.float()
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    inverse = (norm * norm / h.shape[-1] + eps).rsqrt_()
    return _store((h * inverse).mul_(weight), x.dtype, quantize), summed


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Add the residual, then shift and scale each row to mean 0 and variance 1.

    h = x + residual        y = (h - mean_k h) / sqrt(var_k h + eps) * weight + bias

    Args and returns: as `rms_norm`, with bias [K] or None.

    Source: layer normalization (arXiv 1607.06450), equation 4.
    """
    summed = x if residual is None else x + residual
    y = F.layer_norm(summed.float(), weight.shape, weight.float(), None if bias is None else bias.float(), eps)
    return _store(y, x.dtype, quantize), summed


def silu_mul(gate_up: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """Gate the second half of each row by SiLU of the first.

    y = silu(gate) * up        silu(g) = g / (1 + exp(-g))

    Args:
        gate_up: [T, 2F] float, the gate in columns 0..F-1, up in F..2F-1.
        quantize: None writes [T, F] in gate_up's dtype; `ToInt8` writes codes and scale of the float32 y.

    Source: GLU variants (arXiv 2002.05202), SwiGLU.
    """
    if len(gate_up) > ROWS_AT_ONCE:
        return _joined([silu_mul(gate_up[rows], quantize) for rows in _row_blocks(len(gate_up))])
    gate, up = gate_up.float().chunk(2, dim=-1)
    return _store(F.silu(gate).mul_(up), gate_up.dtype, quantize)


def gelu_mul(gate_up: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """Gate the second half of each row by GELU, in its tanh form, of the first.

    y = gelu(gate) * up

    Args: as `silu_mul`.

    Source: GLU variants (arXiv 2002.05202), GEGLU.
    """
    if len(gate_up) > ROWS_AT_ONCE:
        return _joined([gelu_mul(gate_up[rows], quantize) for rows in _row_blocks(len(gate_up))])
    gate, up = gate_up.float().chunk(2, dim=-1)
    return _store(F.gelu(gate, approximate="tanh").mul_(up), gate_up.dtype, quantize)


def gelu(
    x: Tensor, approximate: Literal["none", "tanh"] = "none", quantize: ToInt8 | None = None
) -> Tensor | Quantized:
    """Apply GELU, x * Phi(x), exactly or by its tanh form; [T, K] as in `silu_mul`.

    Source: GELU (arXiv 1606.08415), section 2.
    """
    return _store(F.gelu(x.float(), approximate=approximate), x.dtype, quantize)


def relu(x: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """Apply max(x, 0); [T, K] as in `silu_mul`. NaN stays NaN."""
    return _store(F.relu(x.float()), x.dtype, quantize)


def int8_matmul(x_q: Tensor, weight_q: Tensor) -> Tensor:
    """Multiply int8 by int8 exactly: accumulator [T, N] int32 = x_q [T, K] @ weight_q [N, K]^T.

    Raises:
        ValueError: K is above 133,144, where 127 * 127 * K no longer fits in int32.
    """
    if x_q.shape[-1] > MAX_DEPTH:
        raise ValueError(f"K = {x_q.shape[-1]} can overflow the int32 accumulator; the limit is {MAX_DEPTH}")
    return torch._int_mm(x_q.contiguous(), weight_q.t())


MAX_DEPTH = (2**31 - 1) // (CODE_MAX * CODE_MAX)

ROWS_AT_ONCE = 128

VECTOR = 16
"""float32 values in the widest vector register."""


def int8_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    out_scale: Tensor | None = None,
    is_blocked: bool = False,
) -> Tensor | Quantized:
    """Apply a W8A8 Linear: one int8 GEMM, both scales applied after the sum.

    acc = x_q @ weight_q^T  (int32)        y_tn = acc_tn * x_scale_t * weight_scale_n + bias_n + residual_tn

    Neither scale depends on the summed index k, which is what leaves the sum to the int8 tensor cores. Where x has a
    scale per block p of 128 columns, the sum is theirs within a block: acc_tn * x_scale_t is then
    sum_p acc_tnp * x_scale_tp in float32, added in the order of p.

    Args:
        x: codes [T, K], scale [T], [1] or [T, ceil(K / 128)].
        weight_q: [N, K] int8, rows contiguous.
        weight_scale: float32 [N] (per output channel) or [1] (per tensor).
        bias: [N] float or None.
        residual: [T, N] float or None.
        out_dtype: float16, bfloat16 or float32; of y where out_scale is None.
        out_scale: float32 [1]: write y as `Quantized` with this static scale instead.
        is_blocked: write y as `Quantized` with one scale per row and 128 columns instead (`quantize_blocks`).

    Returns:
        y [T, N].

    Raises:
        ValueError: K is above `MAX_DEPTH`, x.scale has two dimensions and is not [T, ceil(K / 128)], or out_scale and
            is_blocked are both given.

    Source: SmoothQuant (arXiv 2211.10438), equation 2.
    """
    quantize = ToInt8(out_scale, is_blocked) if is_blocked or out_scale is not None else None
    acc, x_scale = _sum_blocks(x, weight_q) if x.scale.ndim == 2 else (int8_matmul(x.codes, weight_q), x.scale)
    if len(acc) <= ROWS_AT_ONCE:
        return _finish(acc, x_scale, weight_scale, bias, residual, out_dtype, quantize)
    x_scale = x_scale.expand(len(acc))
    return _joined(
        [
            _finish(
                acc[rows],
                x_scale[rows],
                weight_scale,
                bias,
                None if residual is None else residual[rows],
                out_dtype,
                quantize,
            )
            for rows in _row_blocks(len(acc))
        ]
    )


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
    blocks = []
    for rows in _row_blocks(max(1, len(x.codes))):
        acc = _sum_parts(x.codes[rows], weight_q, scales, group_size)
        added = None if residual is None else residual[rows]
        blocks.append(_finish(acc, x_scale[rows], one, bias, added, out_dtype, None))
    y = _joined(blocks)
    assert isinstance(y, Tensor)  # nothing was quantized
    return y


def int8_outlier_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    threshold: float = 6.0,
) -> Tensor:
    """Apply a Linear in int8 but for the input columns that hold an outlier, which it multiplies in float.

    O = {k : max_t |x_tk| >= threshold}
    y_tn = int8_linear(x without O)_tn + weight_scale_n * sum_{k in O} x_tk * weight_q_nk

    What is split is the summed dimension, the features: every token has its outlier features multiplied in float and
    all others in int8, with row scales found without them.

    Args:
        x: [T, K] float, any strides.
        weight_q: [N, K] int8, rows contiguous. In the float part it stands for weight_q * weight_scale: the float
            weight is not kept.
        weight_scale: float32 [N] or [1].
        bias: [N] float or None.
        residual: [T, N] float or None.
        out_dtype: float16, bfloat16 or float32; of y, and of the int8 part before the float part is added.
        threshold: positive, in x's units. NaN counts as an outlier.

    Returns:
        y [T, N]. A row depends on its batch, which decides O.

    Source: LLM.int8() (arXiv 2208.07339), section 3.2 and equation 8.
    """
    x_q, (columns, count) = split_outliers(x, threshold)
    y = int8_linear(x_q, weight_q, weight_scale, bias, residual, out_dtype)
    assert isinstance(y, Tensor)  # no out_scale was given
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
        quantize: None writes y; `ToInt8` writes codes and scale of y as rounded to out_dtype, or in blocks of the
            float32 y.

    Source: GLU variants (arXiv 2002.05202), SwiGLU; fusion after ZeroQuant (arXiv 2206.01861), section 4.3.
    """
    z = int8_linear(x, weight_q, weight_scale, bias, out_dtype=torch.float32)
    assert isinstance(z, Tensor)
    blocks = [z[rows] for rows in _row_blocks(max(1, len(z)))]
    rounded = torch.float32 if quantize is not None and quantize.is_blocked else out_dtype
    gated = [(F.silu(block[:, ::2]) * block[:, 1::2]).to(rounded) for block in blocks]
    return _joined([_store(y, out_dtype, quantize) for y in gated])


def _sum_blocks(x: Quantized, weight_q: Tensor) -> tuple[Tensor, Tensor]:
    """The product with the scales of x applied block by block, [T, N] float32, and the scale 1 that is left."""
    T, K = x.codes.shape
    if x.scale.shape != (T, -(-K // BLOCK)):
        raise ValueError(f"x.scale {tuple(x.scale.shape)} must be {(T, -(-K // BLOCK))} for x {(T, K)}")
    return _sum_parts(x.codes, weight_q, x.scale.t().unsqueeze(-1), BLOCK), x.scale.new_ones(1)


def _sum_parts(x_q: Tensor, weight_q: Tensor, scales: Tensor, width: int) -> Tensor:
    """sum_p (x_q weight_q^T over columns p * width ..) * scales[p], float32 [T, N], in the order of p.

    Each part is one int8 product that reads its columns where they lie: two thirds of the time that copies of them
    would take at one token, half of it at 128 (K = 576 and 1536, 9 to 12 parts).
    """
    acc = scales.new_zeros(len(x_q), len(weight_q))
    for part, scale in enumerate(scales):
        columns = slice(part * width, (part + 1) * width)
        acc.addcmul_(torch._int_mm(x_q[:, columns], weight_q[:, columns].t()), scale)
    return acc


def _finish(
    acc: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    quantize: ToInt8 | None,
) -> Tensor | Quantized:
    """The epilogue of `int8_linear` on the accumulator [T, N]."""
    y = acc * weight_scale
    y.mul_(x_scale.unsqueeze(-1))
    if bias is not None:
        y.add_(bias)
    if residual is not None:
        y.add_(residual)
    return _store(y, out_dtype, quantize)


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
) -> Tensor:
    """Rotate queries and keys by their positions; write keys and values into the paged cache.

    For i < R/2, with c, s = cos_sin[position, i], cos_sin[position, R/2 + i]:
        out_i = x_i c - x_{i+R/2} s        out_{i+R/2} = x_{i+R/2} c + x_i s        (columns from R on unchanged)
    With weights each head of q and k is first scaled to unit root mean square: x / sqrt(mean_d x^2 + eps) * weight.

    Args:
        qkv: [T, (H + 2G) D] float: queries, then keys, then values, head by head.
        positions: [T] int32, row of cos_sin.
        slots: [T] int32, block * block_size + offset; -1 writes nothing (a padding row).
        cos_sin: [P, R] float32, R even and at most D; 0 turns nothing.
        k_cache, v_cache: [num_blocks, block_size, G, D], written in place. Either may be `Quantized`, int8 codes with
            a float32 scale [num_blocks, block_size, G]: each token's head is then rounded with a scale of its own, by
            the rules of `quantize_rows`, the key after its rotation in float32.
        num_heads: H.
        q_weight, k_weight: [D] float, of the norms of queries and keys; both or neither.
        eps: added to the mean square.

    Returns:
        q [T, H, D] in qkv's dtype, rotated.

    Source: RoFormer (arXiv 2104.09864), equation 34, with halves instead of neighbours paired; PagedAttention
    (arXiv 2309.06180); norms of queries and keys: arXiv 2302.05442, section 2.
    """
    num_kv_heads, head_size = (k_cache.codes if isinstance(k_cache, Quantized) else k_cache).shape[-2:]
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
    return rotated[:, :num_heads].to(qkv.dtype)


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
    max_query_len: int,
    scale: float,
    quantize: ToInt8 | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor | Quantized:
    """Attend causally over the paged cache, for prefill chunks and decodes in one batch.

    Request b owns query rows query_starts[b] .. query_starts[b+1]-1; row i of its n sits at position
    context_lens[b] - n + i and sees keys 0 .. that position.        y = softmax(q k^T * scale) v
    With a soft cap c the scores are c tanh(q k^T * scale / c).

    Args:
        q: [T, H, D] float.
        k_cache, v_cache: [num_blocks, block_size, G, D] float, or such int8 codes with a float32 scale
            [num_blocks, block_size, G]; H is a multiple of G, and heads h*H/G .. share key head h.
        block_tables: [B, max_blocks] int32, entries beyond the context never read.
        query_starts: [B + 1] int32, rising.
        context_lens: [B] int32, keys of each request, this step's own included.
        max_query_len: the largest number of query rows of one request (a grid size; 1 for a decode step).
        scale: positive, usually D ** -0.5.
        quantize: None writes y in q's dtype; `ToInt8` writes codes and scale of y rounded to q's dtype.
        window: row i sees only the last window keys up to its own position; None for all. At least 1.
        soft_cap: positive bound of the scores, None for none.

    Returns:
        y [T, H * D]. Rows outside every request are not defined.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1; PagedAttention (arXiv 2309.06180); window: Longformer
    (arXiv 2004.05150), section 3.1; soft cap: Gemma 2 (arXiv 2408.00118), section 2.
    """
    if max_query_len == 1 and len(context_lens) == len(q):
        out = _decode_attention(q, k_cache, v_cache, block_tables, context_lens, scale, window, soft_cap)
        return _store(out, q.dtype, quantize)
    out = torch.empty_like(q).flatten(1)
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    lengths = [stop - start for start, stop in pairwise(starts)]
    # A lone row always goes through the batched product: it rounds the same whatever shares its step.
    decodes = [b for b, length in enumerate(lengths) if length == 1]
    if decodes:
        rows = [starts[b] for b in decodes]
        out[rows] = _decode_attention(
            q[rows], k_cache, v_cache, block_tables[decodes], context_lens[decodes], scale, window, soft_cap
        )
    for b, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        if length < 2:
            continue
        chunk = slice(starts[b], starts[b + 1])
        keys, values = (_gather_blocks(cache, block_tables[b : b + 1], context) for cache in (k_cache, v_cache))
        mask = torch.ones(length, context, dtype=torch.bool, device=q.device).tril(context - length)
        if window is not None:
            mask = mask.triu(context - length - window + 1)
        y = _attend(q[chunk].float().transpose(0, 1)[None], keys, values, mask, scale, soft_cap)
        out[chunk] = y[0].transpose(0, 1).flatten(1).to(q.dtype)
    return _store(out, q.dtype, quantize)


def _decode_attention(
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
    # In whole vectors and always masked, so that a row is summed in the same order whatever the longest context is.
    longest = -(-int(context_lens.max()) // VECTOR) * VECTOR
    positions = torch.arange(longest, device=q.device)
    # Beyond a context its last key is read again: a slot never written may hold NaN, and 0 * NaN would pass the mask.
    inside = torch.minimum(positions, context_lens[:, None] - 1)
    slots = block_tables.gather(1, (inside // block_size).long()) * block_size + inside % block_size
    keys, values = (_gather(cache, slots) for cache in (k_cache, v_cache))
    beyond = positions >= context_lens[:, None]
    if window is not None:
        beyond |= positions < context_lens[:, None] - window
    mask = torch.zeros(beyond.shape, device=q.device).masked_fill_(beyond, float("-inf"))[:, None, None]
    return _attend(q.float()[:, :, None], keys, values, mask, scale, soft_cap).flatten(1).to(q.dtype)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """softmax(q k^T * scale) v, [B, H, rows, D] float32. mask: True or 0 where a row sees a key."""
    if soft_cap is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    keys, values = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (keys, values))
    scores = torch.tanh(q @ keys.transpose(-1, -2) * (scale / soft_cap)) * soft_cap
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ values


def _gather_blocks(cache: Tensor | Quantized, block_tables: Tensor, num_tokens: int) -> Tensor:
    """The first num_tokens slots of each request's blocks: [B, G, num_tokens, D] float32."""
    if isinstance(cache, Quantized):
        codes, scale = _gather_blocks(cache.codes, block_tables, num_tokens), cache.scale.unsqueeze(-1)
        return codes * _gather_blocks(scale, block_tables, num_tokens)
    block_size = cache.shape[1]
    num_blocks = -(-num_tokens // block_size)
    blocks = cache.index_select(0, block_tables[:, :num_blocks].reshape(-1))
    return blocks.view(len(block_tables), -1, *cache.shape[2:])[:, :num_tokens].float().transpose(1, 2)


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


def _row_blocks(num_rows: int) -> Iterator[slice]:
    """Rows in blocks whose float32 values stay in the cache: a pass over whole prompts takes three times as long."""
    for start in range(0, num_rows, ROWS_AT_ONCE):
        yield slice(start, start + ROWS_AT_ONCE)


def _joined(blocks: list[Tensor | Quantized]) -> Tensor | Quantized:
    """Blocks of rows as one tensor. A static scale is the same in each."""
    quantized = [block for block in blocks if isinstance(block, Quantized)]
    if not quantized:
        return torch.cat([block for block in blocks if isinstance(block, Tensor)])
    scale = quantized[0].scale
    is_static = all(block.scale is scale for block in quantized)
    return Quantized(
        torch.cat([block.codes for block in quantized]),
        scale if is_static else torch.cat([block.scale for block in quantized]),
    )


def _store(y: Tensor, dtype: torch.dtype, quantize: ToInt8 | None) -> Tensor | Quantized:
    """Round a float32 result to what the caller asked for."""
    if quantize is None:
        return y.to(dtype)
    if quantize.is_blocked:
        return quantize_blocks(y)
    return quantize_rows(y) if quantize.scale is None else quantize_tensor(y, quantize.scale)
