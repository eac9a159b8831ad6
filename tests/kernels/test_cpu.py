"""The ops in C, against the equations in float64 and against the reference, whose roundings they share."""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import library, ops, product
from kernels.quantized import Quantized, ToInt8
from kernels.reference.attention import as_multiplied
from tests.support.kernel_checks import check_codes, check_float, codes_of, floats_of

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
STATIC = torch.tensor([0.02])
in_c = pytest.mark.skipif(library.WHY_NOT is not None, reason=f"not in C: {library.WHY_NOT}")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_cache = pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum((i + 1) * size for i, size in enumerate(shape)))
    return torch.randn(shape, generator=generator).to(dtype)


def codes(*shape: int) -> Tensor:
    """Every int8, -128 too."""
    generator = torch.Generator().manual_seed(sum((i + 1) * size for i, size in enumerate(shape)))
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def hostile(T: int, K: int, dtype: torch.dtype) -> Tensor:
    """Rows of zeros, of numbers too small for a scale, and of ties, and one with an outlier."""
    x = randn(T, K, dtype=dtype)
    x[0] *= 100
    if T > 3:
        x[1], x[2], x[3] = 0, 2.0**-110, torch.arange(K) % 255 - 127
        x[3] += 0.5
    return x


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("gcc") is None, reason="needs x86 and a C compiler")
def test_the_extension_is_compiled_where_it_can_be() -> None:
    assert library.WHY_NOT in (None, "this processor has no AVX2")


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "C": product.in_c,
    "VNNI": product.by_vnni,
    "AMX": product.by_amx,
    "torch": product.by_int_mm,
    "float sums": product.by_float_sums,
}


@pytest.mark.parametrize("way", PRODUCTS)
def test_every_product_is_exact(way: str) -> None:
    if way == "C" and library.WHY_NOT is not None:
        pytest.skip(library.WHY_NOT)
    if way == "VNNI" and not product.HAS_VNNI:
        pytest.skip("this processor has no AVX-512 VNNI, or nothing was compiled")
    if way == "AMX" and not product.HAS_AMX:
        pytest.skip("this process cannot use AMX, or nothing was compiled")
    for T in (*range(1, 14), 16, 33, 48, 128, 131, 259):
        for N, K in ((1, 1), (8, 2), (15, 15), (16, 16), (33, 17), (50, 44), (9, 63), (48, 576), (7, 2100), (17, 1537)):
            x, weight = codes(T, K + 3)[:, :K], codes(N, K + 5)[:, 5:]
            acc = torch.full((T, N), 77, dtype=torch.int32)
            PRODUCTS[way](x, weight, acc)
            assert torch.equal(acc.long(), x.long() @ weight.long().t()), (T, N, K)
    # The longest sums, of the largest terms: beyond float32's integers, and within one of int32's end.
    for T, N in ((1, 1), (9, 3)):
        ends = [torch.full((max(T, N), 131_071), end, dtype=torch.int8) for end in (-128, 127)]
        ends.append(torch.tensor([-128, 127], dtype=torch.int8).repeat(65_536)[:131_071].expand(max(T, N), -1))
        for x in ends:
            for weight in ends:
                acc = torch.empty(T, N, dtype=torch.int32)
                PRODUCTS[way](x[:T].contiguous(), weight[:N].contiguous(), acc)
                assert bool((acc == (x[0].long() * weight[0].long()).sum()).all())


@in_c
def test_a_product_writes_its_sums_alone() -> None:
    for T in (3, 6, 7, 12, 130):
        for N, K in ((5, 3), (17, 33), (18, 790)):
            x, weight = codes(T, K), codes(N, K)
            memory = torch.full((T + 2, N), 77, dtype=torch.int32)
            product.in_c(x, weight, memory[1:-1])
            assert torch.equal(memory[1:-1].long(), x.long() @ weight.long().t())
            assert bool((memory[:: T + 1] == 77).all())


@in_c
def test_a_product_over_nothing_is_zero() -> None:
    for T in (9, 3):
        acc = torch.full((T, 5), 77, dtype=torch.int32)
        product.in_c(codes(T, 0), codes(5, 0), acc)
        assert not acc.any()
    if product.HAS_VNNI:
        product.by_vnni(codes(3, 0), codes(5, 0), acc.fill_(77))
        assert not acc.any()
    if product.HAS_AMX:
        product.by_amx(codes(3, 0), codes(5, 0), acc.fill_(77))
        assert not acc.any()


@in_c
@each_dtype
@pytest.mark.parametrize("T", [0, 1, 3, 7, 18, 32, 128, 129, 300, 530])
@pytest.mark.parametrize(
    "lacks",
    [(), ("HAS_AMX",), ("HAS_AMX", "HAS_VNNI"), ("HAS_AMX", "HAS_VNNI", "HAS_INT8_DOT")],
    ids=["", "no AMX", "no VNNI", "AVX2"],
)
def test_int8_linear_has_the_bits_of_the_reference(
    T: int, dtype: torch.dtype, lacks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in lacks:
        monkeypatch.setattr(product, name, False)
    N, K = (530, 100) if T != 129 else (53, 1600)
    weight_q, bias, residual = codes(N, K), randn(N, dtype=dtype), randn(T, N, dtype=dtype)
    for x_scale in (randn(T).abs(), STATIC):
        for weight_scale in (randn(N).abs(), STATIC):
            for b, r in ((None, None), (bias, residual), (bias.float(), None), (None, residual.float())):
                x = Quantized(codes(T, K), x_scale)
                got = ops.int8_linear(x, weight_q, weight_scale, b, r, dtype)
                assert torch.equal(got, reference.int8_linear(x, weight_q, weight_scale, b, r, dtype))


@in_c
@each_dtype
@pytest.mark.parametrize("T", [0, 1, 129])
@pytest.mark.parametrize("quantize", [None, ToInt8(), ToInt8(STATIC)], ids=["float", "row", "static"])
def test_int8_gated_linear(T: int, dtype: torch.dtype, quantize: ToInt8 | None) -> None:
    K, N = 60, 2 * 77
    x, weight_q = Quantized(codes(T, K), randn(T).abs() / 20), codes(N, K)
    for weight_scale, bias in ((randn(N).abs() / 50, randn(N, dtype=dtype)), (STATIC, None)):
        got = ops.int8_gated_linear(x, weight_q, weight_scale, bias, dtype, quantize)
        z = (x.codes.double() @ weight_q.double().t()) * x.scale.double()[:, None] * weight_scale.double()
        z = z if bias is None else z + bias.double()
        want = z[:, ::2] / (1 + torch.exp(-z[:, ::2])) * z[:, 1::2]
        if T == 0:
            assert len(got[0] if isinstance(got, Quantized) else got) == 0
        elif quantize is None:
            check_float(got, want, dtype)
        else:
            # Rounded to dtype first, as the docstring has it; ties of that rounding may fall either way.
            plain = floats_of(ops.int8_gated_linear(x, weight_q, weight_scale, bias, dtype))
            check_codes(got, plain.double(), quantize.scale)


@in_c
@each_dtype
@pytest.mark.parametrize("quantize", [None, ToInt8(), ToInt8(STATIC)], ids=["float", "row", "static"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, quantize: ToInt8 | None, with_residual: bool) -> None:
    for T, K in ((1, 64), (17, 100), (63, 576), (300, 7)):
        x, weight = hostile(T, K, dtype), randn(K, dtype=dtype)
        residual = randn(T, K, dtype=dtype) if with_residual else None
        y, h = ops.rms_norm(x, weight, EPS, residual, quantize)
        assert torch.equal(h, x if residual is None else x + residual)
        exact = h.double()
        want = exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        if quantize is None:
            check_float(y, want, dtype)
        else:
            check_codes(y, want, quantize.scale)


@in_c
@each_dtype
def test_codes_have_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    for T, K in ((0, 8), (1, 1), (5, 100), (300, 576)):
        x = hostile(T, K, dtype) if T else randn(T, K, dtype=dtype)
        for apart in (x, torch.cat((x, x), 1)[:, :K]):
            got, want = ops.quantize_rows(apart), reference.quantize_rows(apart)
            assert torch.equal(got.codes, want.codes)
            assert torch.equal(got.scale, want.scale)
            static = ops.quantize_tensor(apart, STATIC)
            assert torch.equal(static.codes, reference.quantize_tensor(apart, STATIC).codes)
            assert static.scale is STATIC


@in_c
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
def test_a_fault_shows_in_the_scale_of_its_row(fault: float) -> None:
    x, weight = randn(3, 100), randn(100)
    x[1, 50] = fault
    gate_up = torch.cat((x, x), 1)
    for y in (ops.quantize_rows(x), ops.rms_norm(x, weight, EPS, None, ToInt8())[0], ops.silu_mul(gate_up, ToInt8())):
        assert codes_of(y).scale.isfinite().tolist() == [True, False, True]


@in_c
@each_dtype
def test_silu_mul(dtype: torch.dtype) -> None:
    gate = torch.cat((torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4])))
    gate_up = torch.stack((gate, randn(len(gate)))).to(dtype).flatten()[None]
    x = gate_up.double()
    want = x[:, : len(gate)] / (1 + torch.exp(-x[:, : len(gate)])) * x[:, len(gate) :]
    check_float(ops.silu_mul(gate_up), want, dtype)
    # By the value itself, not by the largest of the row: e^x within 2 ulp, and a sum, a quotient and a product.
    got = ops.silu_mul(gate_up.float())
    is_normal = want.abs() > 1e-30
    error = ((floats_of(got).double() - want).abs() / want.abs())[is_normal]
    assert error.max().item() < 6 * 2.0**-23
    check_codes(ops.silu_mul(gate_up.float(), ToInt8()), want)


def caches(dtype: torch.dtype, num_blocks: int, block_size: int, G: int, D: int) -> tuple[Tensor, Tensor]:
    """What no slot holds is NaN: reading it would show."""
    shape = (num_blocks, block_size, G, D)
    return torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)


@in_c
@each_cache
@pytest.mark.parametrize("rotated", [0, 16, 64])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_and_cache(dtype: torch.dtype, cache_dtype: torch.dtype, rotated: int, with_norm: bool) -> None:
    T, H, G, D = 37, 6, 2, 64
    qkv = randn(T, (H + 2 * G) * D, dtype=dtype)
    positions, slots = torch.arange(T, dtype=torch.int32) * 3, torch.randperm(T + 7)[:T].to(torch.int32)
    slots[5] = slots[9] = -1
    cos_sin = randn(3 * T, rotated)
    q_weight, k_weight = (randn(D, dtype=dtype), randn(D + 1, dtype=dtype)[1:].clone()) if with_norm else (None, None)
    got_caches, want_caches = (caches(cache_dtype, 3, 16, G, D) for _ in range(2))
    q = ops.rope_and_cache(qkv, positions, slots, cos_sin, *got_caches, H, q_weight, k_weight, EPS)
    want = reference.rope_and_cache(qkv, positions, slots, cos_sin, *want_caches, H, q_weight, k_weight, EPS)
    # With norms the squares are summed in another order.
    slack = torch.finfo(dtype).eps * 4 if with_norm else 0.0
    for got, wanted in ((q, want), *zip(got_caches, want_caches, strict=True)):
        assert torch.equal(got.isnan(), wanted.isnan())
        error = (got.float() - wanted.float()).abs().nan_to_num()
        assert bool((error <= slack * wanted.float().abs().nan_to_num().clamp(min=1)).all())


@in_c
@each_dtype
@pytest.mark.parametrize("rotated", [0, 64])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_and_cache_of_codes(
    dtype: torch.dtype, rotated: int, with_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded as the reference does it: queries after they are rounded to their type, keys before, and heads that are
    zero or hold NaN among them. Slots that are not of the step keep what they hold."""
    calls: list[int] = []
    native = library.native.rope_and_cache

    def counted(*numbers: float) -> None:
        calls.append(1)
        native(*numbers)

    monkeypatch.setattr(library.native, "rope_and_cache", counted)
    T, H, G, D = 37, 6, 2, 64
    qkv = randn(T, H + 2 * G, D, dtype=dtype)
    qkv[3], qkv[4, 1], qkv[4, H], qkv[4, -1] = 0, 0, 0, 0
    qkv[5, 2, 7] = qkv[6, H + 1, 9] = qkv[6, H + G, 0] = math.nan
    positions, slots = torch.arange(T, dtype=torch.int32) * 3, torch.randperm(T + 7)[:T].to(torch.int32)
    slots[7] = slots[9] = -1
    cos_sin = randn(3 * T, rotated)
    norms = (randn(D, dtype=dtype), randn(D + 1, dtype=dtype)[1:].clone()) if with_norm else (None, None)
    got, want = (
        [Quantized(torch.full((3, 16, G, D), 99, dtype=torch.int8), torch.full((3, 16, G), 9.0)) for _ in range(2)]
        for _ in range(2)
    )

    def rotate(op: Callable[..., Tensor], keys: Quantized, values: Quantized) -> Tensor:
        return op(qkv.flatten(1), positions, slots, cos_sin, keys, values, H, *norms, EPS)

    q, want_q = rotate(ops.rope_and_cache, *got), rotate(reference.rope_and_cache, *want)
    assert calls == [1]
    assert torch.equal(q.isnan(), want_q.isnan())
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.scale.isnan(), theirs.scale.isnan())
    if not with_norm:
        assert torch.equal(q.nan_to_num(), want_q.nan_to_num())
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours.scale.nan_to_num(), theirs.scale.nan_to_num())
            assert torch.equal(ours.codes, theirs.codes)
        return
    # With norms the squares are summed in another order: a value at the edge of two codes may become the other one.
    heads = [(q.float(), want_q.float())]
    heads += [
        (ours.codes * ours.scale[..., None], theirs.codes * theirs.scale[..., None])
        for ours, theirs in zip(got, want, strict=True)
    ]
    for rounded, exact in heads:
        step = exact.nan_to_num().abs().amax(-1, keepdim=True) / 127
        error = (rounded - exact).nan_to_num().abs()
        assert bool((error <= 1.02 * step).all())
        assert bool((error > 0.02 * step).float().mean() < 0.01)


def decode_case(
    dtype: torch.dtype, contexts: list[int], G: int = 2, shared: int = 3, D: int = 64
) -> tuple[Tensor, ...]:
    """q, caches, block tables and contexts; blocks are dealt in no order, and unwritten slots hold NaN."""
    block_size = 16
    needed = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tables = torch.full((len(contexts), max(needed) + 2), 10**6, dtype=torch.int32)
    keys, values = caches(dtype, sum(needed), block_size, G, D)
    for b, (context, count, start) in enumerate(
        zip(contexts, needed, (sum(needed[:b]) for b in range(len(needed))), strict=True)
    ):
        tables[b, :count] = order[start : start + count]
        for token in range(context):
            at = tables[b, token // block_size], token % block_size
            keys[at], values[at] = (
                randn(G, D, token + 1, dtype=dtype)[..., -1],
                randn(G, D, token + 2, dtype=dtype)[..., -1],
            )
    q = randn(len(contexts), G * shared, D, dtype=dtype)
    return q, keys, values, tables, torch.tensor(contexts, dtype=torch.int32)


def exact_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, scale: float, window: int | None
) -> Tensor:
    rows = []
    for b, context in enumerate(contexts.tolist()):
        first = 0 if window is None else max(0, context - window)
        slots = [(int(tables[b, token // 16]), token % 16) for token in range(first, context)]
        k, v = (torch.stack([cache[slot] for slot in slots]).double() for cache in (keys, values))
        heads = q[b].double().view(k.shape[1], -1, k.shape[2])
        weights = (torch.einsum("grd,tgd->grt", heads, k) * scale).softmax(-1)
        rows.append(torch.einsum("grt,tgd->grd", weights, v).flatten())
    return torch.stack(rows)


@in_c
@each_cache
@pytest.mark.parametrize("window", [None, 1, 20])
def test_decode_attention(dtype: torch.dtype, cache_dtype: torch.dtype, window: int | None) -> None:
    for D, shared in ((64, 3), (20, 1), (128, 4)):
        q, keys, values, tables, contexts = decode_case(dtype, [1, 16, 17, 90], shared=shared, D=D)
        keys, values = keys.to(cache_dtype), values.to(cache_dtype)
        starts = torch.arange(5, dtype=torch.int32)
        scale = D**-0.5
        got = ops.paged_attention(q, keys, values, tables, starts, contexts, True, scale, window=window)
        want = exact_attention(q, keys, values, tables, contexts, scale, window)
        check_float(got, want, dtype)
        quantized = ops.paged_attention(q, keys, values, tables, starts, contexts, True, scale, ToInt8(), window)
        check_codes(quantized, floats_of(got).double())


@in_c
@each_dtype
@pytest.mark.parametrize("window", [None, 20])
def test_decode_attention_over_codes(dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    in_c_alone, num_calls = library.native.decode_attention, 0

    def counted(*numbers: float) -> None:
        nonlocal num_calls
        num_calls += 1
        in_c_alone(*numbers)

    monkeypatch.setattr(library.native, "decode_attention", counted)
    for D, shared in ((64, 3), (20, 1), (128, 4)):
        q, keys, values, tables, contexts = decode_case(dtype, [1, 16, 17, 90], shared=shared, D=D)
        # Slots that were never written have any codes and a scale of NaN.
        written = ~keys.isnan().any(-1)
        k, v = (
            Quantized(rounded.codes.view(cache.shape), rounded.scale.view(written.shape).where(written, math.nan))
            for cache in (keys, values)
            for rounded in [reference.quantize_rows(cache.nan_to_num().float().flatten(0, 2))]
        )
        starts, scale = torch.arange(5, dtype=torch.int32), D**-0.5
        got = ops.paged_attention(q, k, v, tables, starts, contexts, True, scale, window=window)
        queries, k_floats, v_floats = as_multiplied(q, k), k.codes * k.scale[..., None], v.codes * v.scale[..., None]
        check_float(got, exact_attention(queries, k_floats, v_floats, tables, contexts, scale, window), dtype)
    assert num_calls == 3


@in_c
@each_dtype
def test_wider_vectors_change_no_bit(dtype: torch.dtype) -> None:
    """Odd widths, so that ends of rows are taken one by one."""
    if not library.native.use_avx512(1):
        pytest.skip("this processor has no AVX-512")
    x, residual, weight = randn(37, 203, dtype=dtype), randn(37, 203, dtype=dtype), randn(203, dtype=dtype)
    x[3] = 0
    x[5, 7] = math.nan
    cos_sin, positions = randn(40, 34), torch.arange(37, dtype=torch.int32)
    q, keys, values, tables, contexts = decode_case(dtype, [1, 16, 17, 90], D=52)
    scales = randn(203).abs()

    def results() -> list[Tensor]:
        found: list[Tensor | Quantized] = []
        for quantize in (None, ToInt8(), ToInt8(torch.tensor([0.02]))):
            found += ops.rms_norm(x, weight, EPS, residual, quantize)
            found += [ops.silu_mul(torch.cat((x, residual), 1), quantize)]
            rows = ops.quantize_rows(x)
            found += [ops.int8_gated_linear(rows, codes(406, 203), scales.repeat(2), None, dtype, quantize)]
        found += [rows, ops.int8_linear(rows, codes(203, 203), scales, weight, residual, dtype)]
        for D, cache in ((52, dtype), (52, torch.int8)):
            shape = (3, 16, 2, D)
            k, v = (
                Quantized(torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[:3]))
                if cache == torch.int8
                else torch.zeros(shape, dtype=dtype)
                for _ in range(2)
            )
            qkv = torch.cat((x, residual, x), 1)[:, : 7 * D].contiguous()
            found += [ops.rope_and_cache(qkv, positions, positions, cos_sin, k, v, 3), k, v]
        starts = torch.arange(5, dtype=torch.int32)
        rounded = [reference.quantize_rows(cache.nan_to_num().float().flatten(0, 2)) for cache in (keys, values)]
        int8 = [Quantized(each.codes.view(keys.shape), each.scale.view(keys.shape[:-1])) for each in rounded]
        for k, v in ((keys, values), (int8[0], int8[1])):
            found += [ops.paged_attention(q, k, v, tables, starts, contexts, True, 0.1)]
            # As the last four rows of one request.
            found += [ops.paged_attention(q, k, v, tables[3:], starts[[0, 4]], contexts[3:], False, 0.1)]
        return [part for each in found for part in (each if isinstance(each, Quantized) else (each,))]

    wide = results()
    try:
        assert not library.native.use_avx512(0)
        narrow = results()
    finally:
        library.native.use_avx512(1)
    for place, (one, other) in enumerate(zip(wide, narrow, strict=True)):
        assert torch.equal(one.isnan(), other.isnan()), place
        assert torch.equal(one.float().nan_to_num(), other.float().nan_to_num()), place


@pytest.fixture(params=["AMX", "bfloat16", "float32"])
def prompt_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of a prompt's rows, for each way in which they are attended."""
    if not ops.HAS_AMX_BFLOAT16 and request.param == "AMX":
        pytest.skip("this processor has no AMX for bfloat16")
    if library.WHY_NOT is not None:
        pytest.skip(library.WHY_NOT)
    if request.param != "AMX":
        monkeypatch.setattr(ops, "HAS_AMX_BFLOAT16", False)
    return torch.float32 if request.param == "float32" else torch.bfloat16


def prompt_case(
    context: int, length: int, H: int, G: int, D: int, cache_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Quantized, Tensor | Quantized, Tensor]:
    """q of the last rows of a request, its caches and block table. What it does not own is NaN, or past all blocks."""
    num_blocks = -(-context // 16)
    keys, values = caches(torch.float32, num_blocks + 1, 16, G, D)
    order = torch.randperm(num_blocks + 1, generator=torch.Generator().manual_seed(2))[:num_blocks]
    slots = (order[:, None] * 16 + torch.arange(16)).flatten()[:context]
    written = [randn(context, G, D), randn(context + 1, G, D)[1:]]
    for cache, heads in zip((keys, values), written, strict=True):
        cache.view(-1, G, D)[slots] = heads
    q = randn(length + 3, H, D, dtype=dtype)[3:]
    table = torch.cat((order, torch.full((3,), 10**6))).to(torch.int32)
    if cache_dtype != torch.int8:
        return q, keys.to(cache_dtype), values.to(cache_dtype), table
    rounded = [reference.quantize_rows(cache.flatten(0, 2)) for cache in (keys, values)]
    k, v = (Quantized(r.codes.view(keys.shape), r.scale.view(keys.shape[:-1])) for r in rounded)
    return q, k, v, table


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize(
    ("context", "length", "H", "G", "D"),
    [(64, 64, 6, 2, 64), (100, 37, 3, 3, 80), (33, 2, 4, 1, 20), (130, 99, 2, 1, 128), (2, 2, 2, 2, 16)],
)
def test_prompt_attention(
    context: int, length: int, H: int, G: int, D: int, window: int | None, cache_dtype: torch.dtype,
    prompt_dtype: torch.dtype,
) -> None:  # fmt: skip
    """In bfloat16 the result is rounded, and by AMX weights before they multiply values; each by at most 2**-8."""
    q, k, v, table = prompt_case(context, length, H, G, D, cache_dtype, prompt_dtype)
    got = ops._prompt_attention(q, k, v, table, context, D**-0.5, window, None)
    assert got is not None
    slots = (table[: -(-context // 16), None] * 16 + torch.arange(16)).flatten()[:context]
    keys, values = (
        (cache.codes * cache.scale[..., None] if isinstance(cache, Quantized) else cache)
        .to(prompt_dtype if isinstance(cache, Quantized) or ops.HAS_AMX_BFLOAT16 else torch.float32)
        .double().view(-1, G, D)[slots].repeat_interleave(H // G, 1)
        for cache in (k, v)
    )  # fmt: skip
    positions = torch.arange(context - length, context)[:, None] - torch.arange(context)
    sees = (positions >= 0) & (positions < (window or context))
    scores = torch.einsum("thd,shd->hts", q.double(), keys) * D**-0.5
    weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
    want, size = (torch.einsum("hts,shd->thd", weights, each).flatten(1) for each in (values, values.abs()))
    rounding = (1.01 * 2**-8 if prompt_dtype == torch.bfloat16 else 2**-20) * (want.abs() + size)
    assert got.dtype == prompt_dtype
    assert bool(((got.double() - want).abs() <= rounding + 1e-5).all())


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_a_prompts_row_has_the_same_bits_in_any_chunk(
    window: int | None, cache_dtype: torch.dtype, prompt_dtype: torch.dtype
) -> None:
    context, D = 150, 64
    q, k, v, table = prompt_case(context, context, 6, 2, D, cache_dtype, prompt_dtype)

    def rows(begin: int, end: int) -> Tensor:
        y = ops._prompt_attention(q[begin:end], k, v, table, end, D**-0.5, window, None)
        assert y is not None
        return y

    whole = rows(0, context)
    for cuts in ((0, 150), (0, 64, 150), (0, 1, 33, 34, 97, 150), (0, 149, 150), (0, 5, 7, 100, 150)):
        pieces = [rows(begin, end) for begin, end in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole), cuts
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(rows(0, context), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_prompt_shows_a_fault_and_what_the_c_does_not_take_is_the_references(prompt_dtype: torch.dtype) -> None:
    q, k, v, table = prompt_case(70, 70, 4, 2, 64, torch.float32, prompt_dtype)
    assert isinstance(k, Tensor)
    k.view(-1, 2, 64)[table[2] * 16 + 8, 1, 5] = math.nan
    y = ops._prompt_attention(q, k, v, table, 70, 0.125, None, None)
    assert y is not None
    faulty = y.view(70, 4, 64).isnan().any(-1)
    assert faulty[40:, 2:].all(), "whoever sees key 40 of the second head"
    assert not faulty[:40].any()
    assert not faulty[:, :2].any()
    assert ops._prompt_attention(q.half(), k, v, table, 70, 0.125, None, None) is None
    assert ops._prompt_attention(q, k, v, table, 70, 0.125, None, 30.0) is None
    requests = table[None], torch.tensor([0, 70], dtype=torch.int32), torch.tensor([70], dtype=torch.int32), False
    assert torch.equal(floats_of(ops.paged_attention(q, k, v, *requests, 0.125))[:40], y[:40].float())


@in_c
def test_a_row_has_the_same_bits_alone_and_in_company_and_beside_prompts() -> None:
    q, keys, values, tables, contexts = decode_case(torch.float32, [33, 5, 80])
    scale, starts = 0.125, torch.arange(4, dtype=torch.int32)
    attend = partial(ops.paged_attention, k_cache=keys, v_cache=values, scale=scale)
    together = floats_of(attend(q, block_tables=tables, query_starts=starts, context_lens=contexts, is_decode=True))
    for b in range(3):
        alone = attend(
            q[b : b + 1], block_tables=tables[b : b + 1], query_starts=starts[:2], context_lens=contexts[b : b + 1],
            is_decode=True,
        )  # fmt: skip
        assert torch.equal(floats_of(alone)[0], together[b])
    # The first two as single rows, the last one as a prompt of four rows.
    mixed = floats_of(
        attend(
            torch.cat((q[:2], randn(4, *q.shape[1:]))), block_tables=tables,
            query_starts=torch.tensor([0, 1, 2, 6], dtype=torch.int32), context_lens=contexts, is_decode=False,
        )
    )  # fmt: skip
    assert torch.equal(mixed[:2], together[:2])
    assert mixed.isfinite().all()


@in_c
def test_threads_change_no_bit() -> None:
    q, keys, values, tables, contexts = decode_case(torch.float32, [300] * 8)
    x, weight_q, weight = Quantized(codes(200, 576), randn(200).abs()), codes(600, 576), randn(576)
    results = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append([
                ops.int8_linear(x, weight_q, STATIC, out_dtype=torch.float32),
                floats_of(ops.int8_gated_linear(x, weight_q, STATIC, out_dtype=torch.float32)),
                floats_of(ops.rms_norm(randn(200, 576), weight, EPS)[0]),
                floats_of(ops.silu_mul(randn(200, 1152))),
                floats_of(ops.paged_attention(q, keys, values, tables, torch.arange(9).int(), contexts, True, 0.1)),
            ])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(first, other) for first, other in zip(results[0], others, strict=True))


@in_c
def test_what_the_c_does_not_take_goes_to_the_reference() -> None:
    x = randn(3, 64, dtype=torch.float16)
    assert torch.equal(ops.quantize_rows(x).codes, reference.quantize_rows(x).codes)
    assert torch.equal(floats_of(ops.silu_mul(x)), floats_of(reference.silu_mul(x)))
    columns = randn(64, 3).t()
    assert torch.equal(ops.quantize_rows(columns).codes, reference.quantize_rows(columns).codes)
    y, _ = ops.rms_norm(columns, randn(64), EPS)
    assert torch.equal(floats_of(y), floats_of(reference.rms_norm(columns, randn(64), EPS)[0]))
    q, keys, values, tables, contexts = decode_case(torch.float32, [5, 40])
    keys, values = keys.nan_to_num(), values.nan_to_num()
    rounded = reference.quantize_rows(keys.view(-1, 64))
    int8_keys = Quantized(rounded.codes.view(keys.shape), rounded.scale.view(keys.shape[:3]))
    for k, v, soft_cap in ((keys, values, 2.0), (int8_keys, int8_keys, 2.0), (int8_keys, values, None)):
        args = (q, k, v, tables, torch.arange(3).int(), contexts, True, 0.1)
        got = ops.paged_attention(*args, soft_cap=soft_cap)
        assert torch.equal(floats_of(got), floats_of(reference.paged_attention(*args, soft_cap=soft_cap)))


def test_without_the_extension_every_op_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "WHY_NOT", "it was not compiled")
    monkeypatch.setattr(product, "WHY_NOT", "it was not compiled")
    x = randn(5, 96)
    got, want = ops.quantize_rows(x), reference.quantize_rows(x)
    assert torch.equal(got.codes, want.codes)
    weight_q, weight_scale = codes(40, 96), randn(40).abs()
    y = ops.int8_linear(got, weight_q, weight_scale, out_dtype=torch.float32)
    check_float(
        y,
        (got.codes.double() @ weight_q.double().t()) * got.scale.double()[:, None] * weight_scale.double(),
        torch.float32,
    )
