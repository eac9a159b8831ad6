"""A decode step in one kernel: the bits of a rotation, a write to the cache and attention, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention, decode_attention, int8_linear, quantize_rows, reference, rope
from kernels.hopper import decode as hopper_decode
from kernels.quantized import Quantized, ToInt8
from kernels.rows import Rows
from tests.support.kernel_checks import floats_of
from tests.support.places import Place

BLOCK_SIZE = 16
CONTEXTS = [1, 47, 128, 200]
LARGE_CONTEXTS = [16, 130, 300, 2048, 2049, *range(500, 565)]
SHAPES = [(64, 64, 6, 2), (80, 32, 2, 1)]
LARGE = [(64, 0, 2, 2), (128, 128, 32, 8), (96, 96, 32, 32), (256, 64, 8, 1), (64, 64, 71, 1)]

Cache = Tensor | Quantized
Found = tuple[Cache, Cache, Tensor | Quantized]


@dataclass
class Case:
    """Decodes of one row each at the end of their contexts, and one row of padding behind them."""

    qkv: Tensor
    rows: Rows
    cos_sin: Tensor
    k: Cache
    v: Cache
    num_heads: int
    scale: float
    sink: Tensor | None = None
    window: int | None = None
    soft_cap: float | None = None

    @property
    def num_requests(self) -> int:
        return len(self.rows.context_lens)

    def apart(self, to: ToInt8 | None = None) -> Found:
        """Its caches and rows by the two ops, each on copies of the caches."""
        rows, k, v = self.rows, copied(self.k), copied(self.v)
        q = rope.rope_and_cache(
            self.qkv, rows.positions, rows.slots, self.cos_sin, k, v, self.num_heads, sink=self.sink
        )
        step = rows.block_tables, rows.query_starts, rows.context_lens, True, self.scale
        return k, v, attention.paged_attention(q, k, v, *step, to, self.window, self.soft_cap)

    def in_one(self, to: ToInt8 | None = None) -> Found:
        """The same by one; what it counts is 0 again afterwards."""
        k, v = copied(self.k), copied(self.v)
        where = self.rows, self.cos_sin, k, v, self.num_heads, self.scale
        y = attention.rotary_attention(self.qkv, *where, to, self.window, self.soft_cap, sink=self.sink)
        assert self.rows.arrivals is not None
        assert not self.rows.arrivals.any()
        return k, v, y

    def behind(self, x: Tensor, weight: Tensor, scale: Tensor) -> Found:
        """The same by one, behind the product that writes its queries, keys and values."""
        k, v = copied(self.k), copied(self.v)
        self.qkv = int8_linear(quantize_rows(x), weight, scale)
        where = self.rows, self.cos_sin, k, v, self.num_heads, self.scale
        return k, v, attention.rotary_attention(self.qkv, *where, ToInt8())


def copied(cache: Cache) -> Cache:
    return Quantized(cache.codes.clone(), cache.scale.clone()) if isinstance(cache, Quantized) else cache.clone()


def case(place: Place, contexts: list[int], D: int, R: int, H: int, G: int, int8: str = "") -> Case:
    B, width = len(contexts), -(-max(contexts) // BLOCK_SIZE) + 1
    ints: Any = {"dtype": torch.int32, "device": place.device}
    order = torch.randperm(B * width, generator=torch.Generator().manual_seed(D)).view(B, width)
    last = torch.tensor(contexts) - 1
    slots = order[torch.arange(B), (last.clamp(min=0) // BLOCK_SIZE)] * BLOCK_SIZE + last % BLOCK_SIZE
    slots[last < 0] = -1
    angles = 100 * place.randn(max(contexts) + 1, R // 2, dtype=torch.float32)

    def cache(name: str) -> Cache:
        heads = place.randn(B * width * BLOCK_SIZE * G, D)
        shape = B * width, BLOCK_SIZE, G
        if name not in int8:
            return heads.view(*shape, D)
        codes, scale = reference.quantize_rows(heads)
        return Quantized(codes.view(*shape, D), scale.view(shape))

    return Case(
        qkv=place.randn(B + 1, (H + 2 * G) * D),
        rows=Rows(
            positions=torch.tensor([*last.clamp(min=0), 0], **ints),
            slots=torch.tensor([*slots, -1], **ints),
            query_starts=torch.arange(B + 1, **ints),
            context_lens=torch.tensor(contexts, **ints),
            block_tables=order.to(place.device, torch.int32),
            is_decode=True,
            arrivals=torch.zeros(B, G, **ints),
            is_alone=True,
        ),
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=1),
        k=cache("k"),
        v=cache("v"),
        num_heads=H,
        scale=D**-0.5,
    )


def parts(found: Found, num_rows: int) -> list[Tensor]:
    """All that an op has written, without the rows of no request."""
    tensors = []
    for each in found:
        tensors += [each.codes, each.scale] if isinstance(each, Quantized) else [each]
    last = found[2]
    written = [last] if isinstance(last, Tensor) else [last.codes, last.scale]
    return [each[:num_rows] if any(each is one for one in written) else each for each in tensors]


@pytest.fixture(autouse=True)
def in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests there are."""
    for limit in ("MAX_TURNED", "MAX_TURNED_ON_HOPPER"):
        monkeypatch.setattr(attention, limit, 1000)


def expect_equal(some: Case, to: ToInt8 | None = None) -> None:
    got, want = (parts(found, some.num_requests) for found in (some.in_one(to), some.apart(to)))
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("int8", ["", "kv", "k"])
def test_the_bits_of_the_two_ops(place: Place, int8: str) -> None:
    for D, R, H, G in place.shapes(SHAPES, LARGE):
        some = case(place, place.shapes([1, 47, 129], LARGE_CONTEXTS), D, R, H, G, int8)
        expect_equal(some, ToInt8())


@pytest.mark.gpu
@pytest.mark.parametrize("int8", ["", "kv"])
def test_earlier_keys_are_read_before_the_queries_are_there(int8: str) -> None:
    """As many requests as start early, of one split and of many, behind the product that writes the queries.

    What is written equals the two ops' after each replay of a graph, whose queries differ from those before.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    gpu = Place("cuda", torch.float16)
    for contexts in ([5000, 300, 257, 1], [600 + 50 * i for i in range(16)], [40 + 9 * i for i in range(63)]):
        some = case(gpu, contexts, 128, 128, 32, 8, int8)
        columns = some.qkv.shape[1]
        weight, scale = gpu.codes(columns, 4096), gpu.randn(columns, dtype=torch.float32).abs() / 1e4
        x = gpu.randn(len(some.qkv), 4096)
        some.behind(x, weight, scale)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = some.behind(x, weight, scale)
        for _ in range(5):
            x.copy_(x.roll(1, dims=1))
            graph.replay()
            want = some.apart(ToInt8())
            pairs = zip(parts(got, some.num_requests), parts(want, some.num_requests), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_against_the_reference(place: Place) -> None:
    some = case(place, CONTEXTS, 64, 64, 6, 2)
    k, v, y = some.in_one()
    where = some.rows, some.cos_sin, some.k, some.v, some.num_heads, some.scale
    want = reference.rotary_attention(some.qkv, *where)
    assert torch.equal(floats_of(v), floats_of(some.v))
    # Both round the same rotation.
    assert torch.allclose(floats_of(k), floats_of(some.k), rtol=torch.finfo(place.dtype).eps, atol=1e-6)
    got, expected = (floats_of(each)[: some.num_requests].double() for each in (y, want))
    # Both round y, and one of them p.
    bound = torch.finfo(place.dtype).eps * (expected.abs() + floats_of(some.v).double().abs().max())
    assert bool(((got - expected).abs() <= bound).all())


@pytest.mark.parametrize("window", [20, 150])
def test_window_and_soft_cap(place: Place, window: int) -> None:
    some = case(place, [1, 47, 200], 64, 64, 4, 2)
    some.window, some.soft_cap = window, 2.0
    expect_equal(some, ToInt8())


@pytest.mark.parametrize("int8", ["", "kv"])
def test_sink(place: Place, int8: str) -> None:
    """A row of the sink stands in for its token's: as queries, as key and as value."""
    some = case(place, [1, 2, 3, 47], 64, 64, 4, 2, int8)
    some.sink = place.randn(2, some.qkv.shape[1])
    expect_equal(some, ToInt8())


def test_one_split(place: Place) -> None:
    """A model of few positions: no request is split, and heads need no sum."""
    some = case(place, [1, 16, 47, 90], 64, 64, 6, 2)
    assert some.rows.block_tables.shape[1] * BLOCK_SIZE <= decode_attention.MIN_SPLIT
    expect_equal(some)


def test_rows_of_no_key_and_requests_of_no_row(place: Place) -> None:
    some = case(place, [40, 0, 200, 33], 64, 64, 6, 2)
    some.rows.query_starts[-1] = 3
    (k, v, y), want = some.in_one(), some.apart()
    assert not floats_of(y)[1].any()
    assert torch.equal(floats_of(y)[:3], floats_of(want[2])[:3])
    # The last row belongs to no request: the two ops write its key, the one leaves it out.
    some.rows.slots[3] = -1
    assert all(torch.equal(floats_of(a), floats_of(b)) for a, b in zip((k, v), some.apart()[:2], strict=True))


def test_drafts_read_the_keys_of_rows_before_them(place: Place) -> None:
    """One request's rows as requests of their own, the last first, so that no order of programs helps."""
    some = case(place, [42, 41, 40], 64, 64, 4, 2)
    rows = some.rows
    rows.block_tables[:] = rows.block_tables[:1].clone()
    rows.slots[:3] = rows.block_tables[0, 2] * BLOCK_SIZE + torch.tensor([9, 8, 7], device=place.device)
    some.rows = replace(rows, is_alone=False)
    expect_equal(some)


@pytest.mark.parametrize("programs", [1, 10, 10_000])
def test_splits_in_one_program(place: Place, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    some = case(place, [130, 600] if place.device == "cpu" else LARGE_CONTEXTS, 64, 64, 2, 1)
    want = parts(some.apart(ToInt8()), some.num_requests)
    for module in (decode_attention, hopper_decode):
        monkeypatch.setattr(module, "ENOUGH_PROGRAMS", programs)
    got = parts(some.in_one(ToInt8()), some.num_requests)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_head_norms_take_the_two_ops(place: Place) -> None:
    some = case(place, [1, 20], 64, 64, 4, 2)
    rows, weights = some.rows, (1 + place.randn(64), 1 + place.randn(64))
    k, v = copied(some.k), copied(some.v)
    where = rows, some.cos_sin, k, v, some.num_heads, some.scale
    y = attention.rotary_attention(some.qkv, *where, None, None, None, *weights, 1e-5)
    turned = rows.positions, rows.slots, some.cos_sin, k, v, some.num_heads
    q = rope.rope_and_cache(some.qkv, *turned, *weights, 1e-5)
    step = rows.block_tables, rows.query_starts, rows.context_lens, True, some.scale
    want = attention.paged_attention(q, k, v, *step)
    assert torch.equal(floats_of(y)[: some.num_requests], floats_of(want)[: some.num_requests])


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_nan_stays_in_its_row(place: Place) -> None:
    some = case(place, [1, 47, 129, 20], 64, 64, 4, 2)
    some.qkv[3] = float("nan")
    _, _, y = some.in_one(ToInt8())
    assert isinstance(y, Quantized)
    assert y.scale[: some.num_requests].isfinite().tolist() == [index != 3 for index in range(some.num_requests)]


def test_bad_shapes(place: Place) -> None:
    some = case(place, [5], 64, 64, 6, 2)
    where = some.rows, some.cos_sin, some.k, some.v, 6, some.scale
    with pytest.raises(ValueError, match="qkv has 639 columns"):
        attention.rotary_attention(some.qkv[:, 1:], *where)
    with pytest.raises(ValueError, match="sink is"):
        attention.rotary_attention(some.qkv, *where, sink=some.qkv[:1].double())
    with pytest.raises(ValueError, match="normed both or neither"):
        attention.rotary_attention(some.qkv, *where, k_weight=some.qkv[0, :64])
