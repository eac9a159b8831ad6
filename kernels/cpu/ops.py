"""The common ops on CPU tensors in C; what the C does not take goes to `kernels.reference`, which describes each op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.library import DTYPES, WHY_NOT, native
from kernels.cpu.product import int8_product, linear_in_one
from kernels.quantized import Quantized, ToInt8
from kernels.reference.attention import decode_attention
from kernels.reference.common import row_slices
from kernels.reference.linear import require_depth
from kernels.rows import Rows

INT8 = 2
"""`INT8` of `enum dtype`, beside DTYPES."""

SUMS_AT_ONCE = 512
"""Rows whose int32 sums are in memory at once. Four prompts of 512 tokens, AVX-512 without AMX, demo model: 0.92, 0.85,
0.85 and 0.82 s with 64, 128, 256 and 512."""

HAS_AMX_BFLOAT16 = WHY_NOT is None and native.has_amx_bfloat16()


def quantize_rows(x: Tensor) -> Quantized:
    """See reference.quantize_rows."""
    return _quantized(x, None) or reference.quantize_rows(x)


def quantize_tensor(x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Quantized:
    """See reference.quantize_tensor."""
    if scale is None or zero_point is not None:
        return reference.quantize_tensor(x, scale, zero_point)
    return _quantized(x, scale) or reference.quantize_tensor(x, scale)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """See reference.rms_norm."""
    if not _takes(x, weight, residual) or x.dim() != 2 or (residual is not None and residual.dtype != x.dtype):
        return reference.rms_norm(x, weight, eps, residual, quantize)
    summed = x if residual is None else torch.empty_like(x)
    num_rows, width = x.shape
    y = _results(num_rows, width, x.dtype, quantize)
    native.rms_norm(
        x.data_ptr(),
        _address(residual),
        summed.data_ptr(),
        DTYPES[x.dtype],
        weight.data_ptr(),
        DTYPES[weight.dtype],
        float(eps),
        num_rows,
        width,
        *_where(y, x.dtype, is_static=_is_static(quantize)),
    )
    return y, summed


def silu_mul(gate_up: Tensor, quantize: ToInt8 | None = None) -> Tensor | Quantized:
    """See reference.silu_mul."""
    if not _takes(gate_up) or gate_up.dim() != 2:
        return reference.silu_mul(gate_up, quantize)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = _results(num_rows, width, gate_up.dtype, quantize)
    native.silu_mul(
        gate_up.data_ptr(),
        DTYPES[gate_up.dtype],
        num_rows,
        width,
        *_where(y, gate_up.dtype, is_static=_is_static(quantize)),
    )
    return y


def int8_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """See reference.int8_linear."""
    if out_dtype not in DTYPES or not _takes(x.codes, x.scale, weight_scale, bias, residual):
        return reference.int8_linear(x, weight_q, weight_scale, bias, residual, out_dtype)
    y = torch.empty(x.codes.shape[0], weight_q.shape[0], dtype=out_dtype)
    in_one = linear_in_one(x.codes, weight_q)
    if in_one is not None:
        require_depth(x.codes)
        numbers = _epilogue(0, x.scale, weight_scale, bias, residual, *y.shape)
        where = x.codes.data_ptr(), weight_q.data_ptr(), x.codes.shape[1], x.codes.stride(0), weight_q.stride(0)
        in_one(*numbers, *where, y.data_ptr(), DTYPES[out_dtype])
        return y
    for rows, numbers in _products(x, weight_q, weight_scale, bias, residual):
        native.finish(*numbers, *_where(y[rows], out_dtype, is_static=False))
    return y


def int8_gated_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    quantize: ToInt8 | None = None,
) -> Tensor | Quantized:
    """See reference.int8_gated_linear."""
    if out_dtype not in DTYPES or not _takes(x.codes, x.scale, weight_scale, bias):
        return reference.int8_gated_linear(x, weight_q, weight_scale, bias, out_dtype, quantize)
    y = _results(x.codes.shape[0], weight_q.shape[0] // 2, out_dtype, quantize)
    for rows, numbers in _products(x, weight_q, weight_scale, bias, None):
        native.finish_gated(*numbers, *_where(_rows(y, rows), out_dtype, is_static=_is_static(quantize)))
    return y


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
    """See reference.rope_and_cache."""
    cache = _cache(k_cache, v_cache)
    if cache is None or sink is not None or not _takes(qkv, positions, slots, cos_sin, q_weight, k_weight):
        return reference.rope_and_cache(
            qkv, positions, slots, cos_sin, k_cache, v_cache, num_heads, q_weight, k_weight, eps, sink
        )
    *_, head_size = cache
    q = torch.empty(qkv.shape[0], num_heads, head_size, dtype=qkv.dtype)
    native.rope_and_cache(
        qkv.data_ptr(),
        q.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        cos_sin.data_ptr(),
        _address(q_weight),
        _address(k_weight),
        DTYPES[qkv.dtype],
        0 if q_weight is None else DTYPES[q_weight.dtype],
        len(qkv),
        num_heads,
        cos_sin.shape[1],
        float(eps),
        *cache,
    )
    return q


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
) -> Tensor | Quantized:
    """See reference.paged_attention. All rows are attended in C, but those under a soft cap."""
    y = reference.paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        is_decode,
        scale,
        window=window,
        soft_cap=soft_cap,
        decode=_decode_attention,
        prompt=_prompt_attention,
    )
    if quantize is None:
        return y
    assert isinstance(y, Tensor)
    return quantize_rows(y) if quantize.scale is None else quantize_tensor(y, quantize.scale)


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
    """See reference.rotary_attention."""
    where = rows.positions, rows.slots, cos_sin, k_cache, v_cache
    q = rope_and_cache(qkv, *where, num_heads, q_weight, k_weight, eps, sink)
    requests = rows.block_tables, rows.query_starts, rows.context_lens, rows.is_decode
    return paged_attention(q, k_cache, v_cache, *requests, scale, quantize, window, soft_cap)


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
    cache = _cache(k_cache, v_cache)
    if cache is None or soft_cap is not None or not _takes(q, block_tables, context_lens):
        return decode_attention(q, k_cache, v_cache, block_tables, context_lens, scale, window, soft_cap)
    y = torch.empty_like(q).flatten(1)
    native.decode_attention(
        q.data_ptr(),
        y.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        DTYPES[q.dtype],
        block_tables.stride(0),
        len(q),
        q.shape[1],
        window or 0,
        float(scale),
        *cache,
    )
    return y


def _prompt_attention(
    q: Tensor,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    block_table: Tensor,
    context: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor | None:
    cache = _cache(k_cache, v_cache) if q.dtype in DTYPES and soft_cap is None else None
    if cache is None or not _takes(q, block_table):
        return None
    y = torch.empty_like(q).flatten(1)
    addresses = q.data_ptr(), y.data_ptr(), block_table.data_ptr()
    step = *addresses, context, len(q), q.shape[1], window or 0, float(scale)
    if HAS_AMX_BFLOAT16 and q.dtype == torch.bfloat16:
        native.prompt_attention_amx(*step, *cache)
    else:
        native.prompt_attention(*step, DTYPES[q.dtype], *cache)
    return y


_KNOWN = (*DTYPES, torch.int8, torch.int32)


def _takes(*tensors: Tensor | None) -> bool:
    """Whether the C is there and reads these tensors, of which None stands for one that is not given."""
    if WHY_NOT is not None:
        return False
    # A loop, as a generator takes twice as long, and at one token the steps of Python are a part of the whole.
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in _KNOWN and tensor.is_contiguous()):
            return False
    return True


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPES[tensor.dtype]


def _quantized(x: Tensor, scale: Tensor | None) -> Quantized | None:
    """x [T, K] as codes, or None if the C does not take it. scale: None for one per row."""
    if WHY_NOT is not None or not x.is_cpu or x.dtype not in DTYPES or x.dim() != 2 or x.stride(1) != 1:
        return None
    num_rows, width = x.shape
    y = _codes(num_rows, width, scale)
    native.quantize(
        x.data_ptr(), DTYPES[x.dtype], x.stride(0), num_rows, width, *_where(y, x.dtype, is_static=scale is not None)
    )
    return y


def _results(num_rows: int, width: int, dtype: torch.dtype, quantize: ToInt8 | None) -> Tensor | Quantized:
    """Room for what an op writes."""
    if quantize is None:
        return torch.empty(num_rows, width, dtype=dtype)
    return _codes(num_rows, width, quantize.scale)


def _codes(num_rows: int, width: int, scale: Tensor | None) -> Quantized:
    return Quantized(torch.empty(num_rows, width, dtype=torch.int8), torch.empty(num_rows) if scale is None else scale)


def _rows(y: Tensor | Quantized, rows: slice) -> Tensor | Quantized:
    if isinstance(y, Tensor):
        return y[rows]
    return Quantized(y.codes[rows], y.scale if y.scale.shape[0] == 1 else y.scale[rows])


def _where(y: Tensor | Quantized, dtype: torch.dtype, *, is_static: bool) -> tuple[int, ...]:
    """The five numbers of `struct target`. dtype: of a float result, and what codes are rounded to before."""
    if isinstance(y, Tensor):
        return y.data_ptr(), DTYPES[dtype], 0, 0, 0
    return 0, DTYPES[dtype], y.codes.data_ptr(), y.scale.data_ptr(), int(is_static)


def _is_static(quantize: ToInt8 | None) -> bool:
    return quantize is not None and quantize.scale is not None


def _products(
    x: Quantized, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Some rows at a time, with `_epilogue` of their sums."""
    require_depth(x.codes)
    num_rows, num_columns = x.codes.shape[0], weight_q.shape[0]
    acc = torch.empty(min(num_rows, SUMS_AT_ONCE), num_columns, dtype=torch.int32)
    for rows in row_slices(num_rows, SUMS_AT_ONCE):
        count = min(rows.stop, num_rows) - rows.start
        int8_product(x.codes[rows], weight_q, acc[:count])
        scale = x.scale[rows] if x.scale.shape[0] > 1 else x.scale
        added = None if residual is None else residual[rows]
        yield rows, _epilogue(acc.data_ptr(), scale, weight_scale, bias, added, count, num_columns)


def _epilogue(
    sums: int,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    num_rows: int,
    num_columns: int,
) -> tuple[int, ...]:
    """The eleven numbers of `struct epilogue`."""
    return (
        sums,
        x_scale.data_ptr(),
        weight_scale.data_ptr(),
        int(x_scale.shape[0] > 1),
        int(weight_scale.shape[0] > 1),
        _address(bias),
        _address(residual),
        _dtype(bias),
        _dtype(residual),
        num_rows,
        num_columns,
    )


def _cache(k_cache: Tensor | Quantized, v_cache: Tensor | Quantized) -> tuple[int, ...] | None:
    """The nine numbers of `struct cache`, or None for caches that the C does not take: not alike, or not contiguous."""
    keys, key_scales = (k_cache.codes, k_cache.scale) if isinstance(k_cache, Quantized) else (k_cache, None)
    values, value_scales = (v_cache.codes, v_cache.scale) if isinstance(v_cache, Quantized) else (v_cache, None)
    are_alike = values.dtype == keys.dtype and values.shape == keys.shape
    if (keys.dtype != torch.int8 and keys.dtype not in DTYPES) or not are_alike:
        return None
    if not _takes(keys, values, key_scales, value_scales):
        return None
    _, block_size, num_kv_heads, head_size = keys.shape
    return (
        keys.data_ptr(),
        values.data_ptr(),
        _address(key_scales),
        _address(value_scales),
        INT8 if keys.dtype == torch.int8 else DTYPES[keys.dtype],
        block_size,
        block_size.bit_length() - 1,
        num_kv_heads,
        head_size,
    )
