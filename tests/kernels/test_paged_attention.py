"""Attention over shuffled blocks against float64, with NaN in every slot (or its scale) that no request owns."""

from __future__ import annotations

from copy import copy
from itertools import pairwise
from typing import Any, overload

import pytest
import torch
import triton.language as tl
from torch import Tensor

from kernels import attention, decode_attention, dequantize, paging, quantize, reference
from kernels.hopper import decode as hopper_decode
from kernels.quantized import Quantized, ToInt8
from kernels.tiles import decode_tile
from tests.support.kernel_checks import codes_of, floats_of
from tests.support.places import Place

MIXED = [(5, 5), (1, 70), (0, 0), (9, 33), (1, 1), (20, 61), (2, 16)]
DECODES = [(1, 1), (1, 16), (1, 130), (1, 47)]
LONG = [(1, 400), (3, 260), (1, 257)]
SHAPES = [(64, 4, 4), (64, 6, 2), (80, 4, 1), (128, 8, 1)]
LARGE = [(64, 32, 8), (96, 32, 32), (128, 32, 8), (256, 8, 1), (64, 71, 1)]


class Case:
    """Requests as (query rows, context): caches, block tables in random order, queries. int8 names int8 caches."""

    def __init__(
        self,
        place: Place,
        requests: list[tuple[int, int]],
        D: int,
        H: int,
        G: int,
        block_size: int = 16,
        int8: str = "",
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        self.requests, self.scale, self.dtype = requests, D**-0.5, place.dtype
        self.window, self.soft_cap = window, soft_cap
        self.keys = [place.randn(context, G, D) for _, context in requests]
        self.values = [place.randn(context + 1, G, D)[1:] for _, context in requests]
        width = max(-(-context // block_size) for _, context in requests) + 1
        order = torch.randperm(len(requests) * width, generator=torch.Generator().manual_seed(D)).to(place.device)
        # Entries beyond a context point at blocks that do not exist: reading one would fault or give NaN.
        self.tables = torch.full((len(requests), width), 2**30, dtype=torch.int32, device=place.device)
        for b, (_, context) in enumerate(requests):
            self.tables[b, : -(-context // block_size)] = order[b * width :][: -(-context // block_size)].int()
        shape = (len(order), block_size, G, D)
        self.k: Tensor | Quantized
        self.v: Tensor | Quantized
        self.k, self.v = (
            self.int8_cache(shape, rows) if name in int8 else self.float_cache(shape, rows)
            for name, rows in (("k", self.keys), ("v", self.values))
        )
        self.context_lens = torch.tensor([context for _, context in requests], dtype=torch.int32, device=place.device)
        starts = torch.tensor([0] + [rows for rows, _ in requests]).cumsum(0)
        self.query_starts = starts.to(place.device, torch.int32)
        self.q = place.randn(int(starts[-1]), H, D)
        self.is_decode = all(rows <= 1 for rows, _ in requests)

    def slots(self, b: int, block_size: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(self.requests[b][1], device=self.tables.device)
        return self.tables[b, tokens // block_size].long(), tokens % block_size

    def float_cache(self, shape: tuple[int, ...], rows: list[Tensor]) -> Tensor:
        cache = torch.full(shape, float("nan"), device=self.tables.device, dtype=self.dtype)
        for b, heads in enumerate(rows):
            cache[self.slots(b, shape[1])] = heads
        return cache

    def int8_cache(self, shape: tuple[int, ...], rows: list[Tensor]) -> Quantized:
        """Codes, and scales with the slots of a block side by side; rows become what the codes stand for."""
        codes = torch.full(shape, -128, dtype=torch.int8, device=self.tables.device)
        scale = torch.full((shape[0], shape[2], shape[1]), float("nan"), device=codes.device).transpose(1, 2)
        for b, heads in enumerate(rows):
            at, rounded = self.slots(b, shape[1]), reference.quantize_rows(heads.flatten(0, 1))
            codes[at], scale[at] = rounded.codes.view(heads.shape), rounded.scale.view(heads.shape[:2])
            rows[b] = codes[at].float() * scale[at][..., None]
        return Quantized(codes, scale)

    @overload
    def run(self, to_int8: None = None) -> Tensor: ...

    @overload
    def run(self, to_int8: ToInt8) -> Quantized: ...

    def run(self, to_int8: ToInt8 | None = None) -> Tensor | Quantized:
        y = attention.paged_attention(
            self.q, self.k, self.v, self.tables, self.query_starts, self.context_lens, self.is_decode, self.scale,
            to_int8, self.window, self.soft_cap,
        )  # fmt: skip
        return floats_of(y) if to_int8 is None else codes_of(y)

    def multiplied(self, q: Tensor) -> Tensor:
        """The queries of a request in float64, as they are multiplied."""
        if isinstance(self.k, Tensor) or len(q) > 1:
            return q.double()
        # On the CPU: torch's CUDA multiplies by the inverse of 127, and a tie may then round the other way.
        rounded = reference.quantize_rows(q.flatten(0, 1).cpu())
        return (rounded.codes.float() * rounded.scale[:, None]).view(q.shape).to(q.device).double()

    def check(self, got: Tensor | Quantized) -> None:
        """Within: p rounded to the dtype, the output rounded, and float32 scores whose exponential is taken.

        Over an int8 cache keys and values are what their codes stand for, those of a prompt in the dtype; of a decode
        queries as well.
        """
        got = floats_of(got)
        assert got.dtype == self.dtype
        half_ulp, start, group = torch.finfo(self.dtype).eps / 2, 0, self.q.shape[1] // self.keys[0].shape[1]
        for (rows, context), keys, values in zip(self.requests, self.keys, self.values, strict=True):
            q = self.multiplied(self.q[start : start + rows]).transpose(0, 1)
            floats = [x.to(self.dtype) if rows > 1 else x for x in (keys, values)]
            k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in floats)
            visible = torch.ones(rows, context, device=q.device, dtype=torch.bool).tril(context - rows)
            if self.window is not None:
                visible = visible.triu(context - rows - self.window + 1)
            scores = q @ k.transpose(1, 2) * self.scale
            if self.soft_cap is not None:
                scores = self.soft_cap * (scores / self.soft_cap).tanh()
            p = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            want, size = (x.transpose(0, 1).flatten(1) for x in (p @ v, p @ v.abs()))
            error = (got[start : start + rows].double() - want).abs()
            bound = half_ulp * want.abs() + (half_ulp + 2.0**-16) * size
            assert bool((error <= bound).all()), f"worst {(error / bound).nan_to_num(1e9).max().item():.3g} x the bound"
            start += rows


@pytest.mark.parametrize("requests", [MIXED, DECODES, LONG], ids=["mixed", "decodes", "long"])
def test_paged_attention(place: Place, requests: list[tuple[int, int]]) -> None:
    for D, H, G in place.shapes(SHAPES if requests is MIXED else SHAPES[1:3], LARGE):
        case = Case(place, requests, D, H, G)
        case.check(case.run())


def test_head_size_256(place: Place) -> None:
    case = Case(place, [(3, 20), (1, 9)], 256, 2, 1)
    case.check(case.run())


@pytest.mark.parametrize("block_size", [32, 128])
def test_block_sizes(place: Place, block_size: int) -> None:
    case = Case(place, MIXED, 64, 3, 1, block_size)
    case.check(case.run())


@pytest.mark.parametrize("int8", ["", "kv"])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_decodes_that_end_beside_the_end_of_a_tile(place: Place, block_size: int, int8: str) -> None:
    lengths, shapes = [1, 15, 16, 17, 33, 65, 127, 128, 129], [(64, 3, 1)]
    if place.device == "cuda":
        lengths += [31, 32, 63, 64, 511, 512, 513, 1500, 5000]
        shapes = [(64, 6, 2), (128, 8, 1), (128, 7, 1), (128, 32, 8), (128, 18, 2)]
    for D, H, G in shapes:
        case = Case(place, [(1, length) for length in lengths], D, H, G, block_size, int8)
        case.check(case.run())


@pytest.mark.parametrize("size", [1e-30, 1e-2, 1e3, 1e30])
def test_int8_values_of_any_size(place: Place, size: float) -> None:
    """The scales of values are in p: it must not leave its dtype, nor lose its digits below it."""
    if not torch.finfo(place.dtype).smallest_normal < size < torch.finfo(place.dtype).max:
        pytest.skip("no such values")
    case = Case(place, [(1, 40), (1, 70)], 64, 4, 2, int8="kv")
    assert isinstance(case.v, Quantized)
    case.v = Quantized(case.v.codes, case.v.scale * size)
    case.values = [values * size for values in case.values]
    case.check(case.run())


def test_int8_values_of_many_sizes(place: Place) -> None:
    """In one tile: a large scale may not take the digits of small ones that have all the weight."""
    case = Case(place, [(1, 40), (1, 70)], 64, 4, 2, int8="kv")
    assert isinstance(case.v, Quantized)
    sizes = torch.full_like(case.v.scale, 2.0**-12)
    for b, (_, context) in enumerate(case.requests):
        blocks, slots = case.slots(b, sizes.shape[1])
        large = torch.arange(context, device=sizes.device)[:, None] % 3 == 1
        sizes[blocks, slots] = torch.where(large, 2.0**4, 2.0**-12)
        case.values[b] = case.values[b] * sizes[blocks, slots][..., None]
    case.v = Quantized(case.v.codes, case.v.scale * sizes)
    case.check(case.run())


def test_decodes_whose_scores_are_infinite(place: Place) -> None:
    """Keys at minus infinity have no weight; where all have none, the row is NaN, and no other is."""
    if place.device == "cpu":
        pytest.skip("the interpreter's numpy raises")
    for keys in (slice(0, 3), slice(None)):
        case = Case(place, [(1, 40), (1, 300), (1, 20)], 64, 4, 2)
        assert isinstance(case.k, Tensor)
        case.q[1] = 1.0
        blocks, slots = case.slots(1, 16)
        case.k[blocks[keys], slots[keys]] = float("-inf")
        got = case.run()
        assert got[1].isnan().all() == (keys == slice(None))
        assert got[1].isfinite().all() == (keys != slice(None))
        assert got[::2].isfinite().all()


def test_long_contexts(place: Place) -> None:
    """More keys than sixteen splits of the shortest length hold."""
    requests = [(1, 2500), (1, 2049)] if place.device == "cpu" else [(1, 2500), (300, 3000), (1, 20_000)]
    case = Case(place, requests, 64, 2, 1, block_size=64)
    case.check(case.run())


def test_a_row_does_not_depend_on_its_batch(place: Place) -> None:
    D, H, G = 64, 6, 2
    batch, start = Case(place, MIXED, D, H, G), 0
    together = batch.run()
    for b, (rows, _) in enumerate(MIXED):
        alone = Case(place, MIXED[b : b + 1], D, H, G)
        alone.k, alone.v, alone.tables = batch.k, batch.v, batch.tables[b : b + 1]
        alone.q = batch.q[start : start + rows]
        assert torch.equal(alone.run(), together[start : start + rows])
        start += rows


def test_padding_requests_of_a_captured_graph(place: Place) -> None:
    """A request with a query row and no key yields zeros, not NaN; its block table is not read."""
    case = Case(place, [(1, 40), (1, 0), (1, 200)], 64, 6, 2)
    out = case.run()
    assert not out[1].any()
    case.requests[1] = (0, 0)
    case.q, kept = torch.cat((case.q[:1], case.q[2:])), torch.cat((out[:1], out[2:]))
    case.check(kept)


def padded(case: Case, num_rows: int, num_requests: int) -> Case:
    """The case with rows of no request, NaN, and requests of no row behind its own."""
    fresh = copy(case)
    fresh.q = torch.cat((case.q, torch.full_like(case.q[:1], float("nan")).expand(num_rows, -1, -1)))
    fresh.query_starts = torch.cat((case.query_starts, case.query_starts[-1:].expand(num_requests)))
    fresh.context_lens = torch.cat((case.context_lens, case.context_lens.new_zeros(num_requests)))
    fresh.tables = torch.cat((case.tables, case.tables[:1].expand(num_requests, -1)))
    return fresh


@pytest.mark.parametrize("int8", ["", "kv"])
@pytest.mark.parametrize("requests", [MIXED, DECODES, [(70, 70)]], ids=["mixed", "decodes", "prompt"])
def test_padding_of_a_mixed_step(place: Place, requests: list[tuple[int, int]], int8: str) -> None:
    """A step padded to the shape of a captured one gives the same bits, however many tiles and requests it adds."""
    case = Case(place, requests, 64, 6, 2, int8=int8)
    case.is_decode = False
    want = case.run()
    case.check(want)
    for num_rows, num_requests in ((1, 0), (0, 3), (150, 9)):
        assert torch.equal(padded(case, num_rows, num_requests).run()[: len(want)], want)


def test_more_requests_than_a_program_reads_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [(1, 9), (2, 16), (0, 0), (3, 3)] * 2
    if place.device == "cpu":
        monkeypatch.setattr(attention, "REQUESTS", tl.constexpr(4))
    else:
        requests *= 50
    case = Case(place, requests, 64, 6, 2)
    case.check(case.run())


@pytest.mark.parametrize("requests", [MIXED, DECODES], ids=["mixed", "decodes"])
def test_int8_cache(place: Place, requests: list[tuple[int, int]]) -> None:
    for D, H, G in place.shapes([(64, 6, 2), (96, 4, 1)], LARGE):
        case = Case(place, requests, D, H, G, int8="kv")
        case.check(case.run())
    for int8 in ("k", "v"):
        case = Case(place, requests, 64, 2, 2, int8=int8)
        case.check(case.run())


PROMPTS = [(1, 40), (20, 25), (0, 0), (9, 60), (3, 33), (16, 16), (1, 5)]


def dequantize_before(monkeypatch: pytest.MonkeyPatch, min_rows: int = 9, keys_per_token: int = 4) -> None:
    """Have every prompt of min_rows rows and more read dequantized keys where there is room."""
    monkeypatch.setattr(dequantize, "MIN_TOKENS", 1)
    monkeypatch.setattr(dequantize, "MIN_QUERIES", tl.constexpr(min_rows))
    monkeypatch.setattr(dequantize, "KEYS_PER_TOKEN", keys_per_token)


@pytest.mark.parametrize(("block_size", "window"), [(16, None), (64, 20)])
def test_dequantized_keys(place: Place, block_size: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has the bits that it has over codes, whichever requests are dequantized, find room, or are padding."""
    requests = PROMPTS if place.device == "cpu" else [(30 * rows, 40 * context) for rows, context in PROMPTS]
    for D, H, G in place.shapes([(64, 4, 2), (80, 2, 1)], LARGE):
        case = Case(place, requests, D, H, G, block_size, int8="kv", window=window)
        if window is not None:
            forget_before(case, window)
        monkeypatch.setattr(dequantize, "MIN_TOKENS", 10**6)
        want = case.run()
        case.check(want)
        for min_rows, keys_per_token, padding in ((9, 4, (0, 0)), (2, 4, (9, 3)), (2, 1, (0, 0))):
            dequantize_before(monkeypatch, min_rows, keys_per_token)
            assert torch.equal(padded(case, *padding).run()[: len(want)], want), (min_rows, keys_per_token)


def test_dequantized_keys_of_one_cache(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    dequantize_before(monkeypatch)
    for int8 in ("v", "k", ""):
        case = Case(place, PROMPTS, 64, 4, 2, int8=int8)
        case.check(case.run())
    case = Case(place, PROMPTS, 64, 4, 2, int8="kv", soft_cap=2.0)
    case.check(case.run())


def test_dequantized_keys_of_many_requests(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a program reads the places of at once."""
    case = Case(place, PROMPTS if place.device == "cpu" else PROMPTS * 60, 64, 4, 2, int8="kv")
    want = case.run()
    dequantize_before(monkeypatch, min_rows=2)
    if place.device == "cpu":
        monkeypatch.setattr(attention, "REQUESTS", tl.constexpr(4))
        monkeypatch.setattr(dequantize, "REQUESTS", tl.constexpr(4))
    assert torch.equal(case.run(), want)


def test_wide_offsets_of_dequantized_keys(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(place, PROMPTS, 64, 4, 2, int8="kv")
    want = case.run()
    dequantize_before(monkeypatch)
    monkeypatch.setattr(paging, "MAX_NARROW", 0)
    assert torch.equal(case.run(), want)


def test_who_reads_dequantized_keys(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of enough rows that find room behind those before: values of another's would show.

    One that no room holds takes none.
    """

    def of_ones(step: Any, num_keys: int, block_n: int) -> Any:
        step, places = dequantize.as_floats(step, num_keys, block_n)
        step.v.fill_(1.0)
        return step, places

    for requests, readers in (
        (PROMPTS, {4: {1, 3, 5}, 1: {1}}),
        ([(10, 300), *PROMPTS], {4: {2, 4, 6}, 1: {2}}),
    ):
        case = Case(place, requests, 64, 4, 2, int8="kv")
        want = case.run()
        for keys_per_token, expected in readers.items():
            with monkeypatch.context() as patch:
                dequantize_before(patch, 9, keys_per_token)
                patch.setattr(attention, "as_floats", of_ones)
                got = case.run()
            start, found = 0, set()
            for number, (rows, _) in enumerate(requests):
                if not torch.equal(got[start : start + rows], want[start : start + rows]):
                    found.add(number)
                start += rows
            assert found == expected


@pytest.mark.parametrize("requests", [DECODES, [(1, 900), (3, 40)]], ids=["decodes", "mixed"])
def test_values_of_decodes_read_in_pairs(
    place: Place, requests: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With codes of queries multiplied as floats or as such, to the same bits; a float cache has no pairs."""

    # Hopper's own kernel has no such tiles.
    monkeypatch.setattr(decode_attention, "suits_hopper", lambda _: False)

    def with_tile(**changes: bool) -> None:
        monkeypatch.setattr(attention, "decode_tile", lambda *args: decode_tile(*args)._replace(**changes))

    for D, H, G in place.shapes([(64, 6, 2), (96, 4, 1)], LARGE):
        case = Case(place, requests, D, H, G, int8="kv")
        with_tile(in_pairs=False, is_int8=False)
        case.check(case.run())
        with_tile(in_pairs=True, is_int8=False)
        want = case.run()
        case.check(want)
        with_tile(in_pairs=True, is_int8=True)
        if place.device == "cuda" and place.dtype == torch.float32:
            # A float32 product has another layout, and a row's sum with it another order.
            case.check(case.run())
        else:
            assert torch.equal(case.run(), want)
    others = [Case(place, requests, 64, 6, 2, int8="v"), Case(place, requests, 64, 6, 2)]
    others.append(Case(place, requests, 64, 6, 2, int8="kv", window=50, soft_cap=2.0))
    for is_int8 in (False, True):
        with_tile(in_pairs=True, is_int8=is_int8)
        for case in others:
            case.check(case.run())


def test_heads_shorter_than_an_int8_product(place: Place) -> None:
    case = Case(place, MIXED, 16, 4, 2, int8="kv")
    case.check(case.run())


def test_int8_row_does_not_depend_on_its_batch(place: Place) -> None:
    batch, start = Case(place, MIXED, 64, 6, 2, int8="kv"), 0
    together = batch.run()
    for b, (rows, _) in enumerate(MIXED):
        alone = Case(place, MIXED[b : b + 1], 64, 6, 2, int8="kv")
        alone.k, alone.v, alone.tables = batch.k, batch.v, batch.tables[b : b + 1]
        alone.q = batch.q[start : start + rows]
        assert torch.equal(alone.run(), together[start : start + rows])
        start += rows


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_fault_of_an_int8_key_is_not_hidden(place: Place) -> None:
    """A key or value that was not finite has scale infinity and codes 0; its request's rows say so, no other's do."""
    for name in ("k", "v"):
        case = Case(place, DECODES, 64, 4, 2, int8="kv")
        getattr(case, name).scale[case.tables[1, 0].long(), 3] = float("inf")
        getattr(case, name).codes[case.tables[1, 0].long(), 3] = 0
        assert case.run().isfinite().all(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("int8", ["", "kv"])
@pytest.mark.parametrize("requests", [MIXED, DECODES, [(1, 300), (0, 0), (1, 7)], [(1, 40)]])
def test_quantized_output(place: Place, requests: list[tuple[int, int]], int8: str) -> None:
    """Codes and scales are those of the unquantized result, bit for bit."""
    for D, H, G in place.shapes([(80, 6, 2)], LARGE):
        case = Case(place, requests, D, H, G, int8=int8)
        y = case.run()
        case.check(y)
        static = torch.full((1,), 0.004, device=y.device)
        for to_int8, want in (
            (ToInt8(), quantize.quantize_rows(y)),
            (ToInt8(static), quantize.quantize_tensor(y, static)),
        ):
            got = case.run(to_int8)
            assert isinstance(got, Quantized)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("requests", [DECODES, LONG, [(1, 900), (1, 2500)]], ids=["decodes", "long", "longer"])
@pytest.mark.parametrize("int8", ["", "k", "kv"])
def test_splits_in_one_program(
    place: Place, requests: list[tuple[int, int]], int8: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split has the same bits whether a program takes one or several, at any number of requests."""
    case = Case(place, requests, 64, 4, 2, int8=int8)
    want = case.run()
    case.check(want)
    for programs in (1, 20):
        for module in (decode_attention, hopper_decode):
            monkeypatch.setattr(module, "ENOUGH_PROGRAMS", programs)
        assert torch.equal(case.run(), want)


def forget_before(case: Case, window: int) -> None:
    """Block tables of blocks that do not exist wherever no row of a request sees a key any more."""
    block_size = case.k.shape[1] if isinstance(case.k, Tensor) else case.k.codes.shape[1]
    for b, (rows, context) in enumerate(case.requests):
        # Tiles start at multiples of at most 128 keys.
        first = max(0, context - max(rows, 1) + 1 - window) // 128 * 128
        case.tables[b, : first // block_size] = 2**30


@pytest.mark.parametrize("window", [1, 16, 50, 300])
@pytest.mark.parametrize("requests", [MIXED, DECODES, LONG], ids=["mixed", "decodes", "long"])
def test_window(place: Place, requests: list[tuple[int, int]], window: int) -> None:
    """Keys before it are masked, and blocks that hold none of it are not read."""
    for D, H, G in place.shapes([(64, 6, 2)], LARGE):
        for int8 in ("", "kv"):
            case = Case(place, requests, D, H, G, int8=int8, window=window)
            forget_before(case, window)
            case.check(case.run())


def test_long_window(place: Place) -> None:
    """Splits count from where the window begins; there are fewer of them than the context would take."""
    requests = [(1, 2500), (1, 2049), (1, 90)] if place.device == "cpu" else [(1, 2500), (300, 3000), (1, 20_000)]
    for window in (200, 1100):
        case = Case(place, requests, 64, 2, 1, block_size=64, window=window)
        forget_before(case, window)
        case.check(case.run())


@pytest.mark.parametrize("requests", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("int8", ["", "kv"])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_soft_cap(place: Place, requests: list[tuple[int, int]], int8: str) -> None:
    """From a cap that most scores reach to one that hardly changes any."""
    for cap in (0.1, 1.0, 50.0):
        for window in (None, 20):
            case = Case(place, requests, 64, 6, 2, int8=int8, window=window, soft_cap=cap)
            case.check(case.run())


def test_window_row_does_not_depend_on_its_batch(place: Place) -> None:
    D, H, G = 64, 6, 2
    batch, start = Case(place, MIXED, D, H, G, window=20, soft_cap=2.0), 0
    together = batch.run()
    for b, (rows, _) in enumerate(MIXED):
        alone = Case(place, MIXED[b : b + 1], D, H, G, window=20, soft_cap=2.0)
        alone.k, alone.v, alone.tables = batch.k, batch.v, batch.tables[b : b + 1]
        alone.q = batch.q[start : start + rows]
        assert torch.equal(alone.run(), together[start : start + rows])
        start += rows


def test_reference_window_and_soft_cap(place: Place) -> None:
    """The oracle in plain torch keeps the same contract."""
    if place.device != "cpu":
        return
    for requests in (MIXED, DECODES):
        for window, cap in ((16, None), (None, 2.0), (50, 2.0)):
            case = Case(place, requests, 64, 6, 2, window=window, soft_cap=cap)
            case.tables.clamp_(max=len(case.k) - 1)
            case.check(
                reference.paged_attention(
                    case.q, case.k, case.v, case.tables, case.query_starts, case.context_lens, case.is_decode,
                    case.scale, None, window, cap,
                )
            )  # fmt: skip


@pytest.mark.parametrize("int8", ["", "kv"])
def test_reference_multiplies_no_slot_of_others(place: Place, int8: str) -> None:
    """NaN that a lost request left in a block, or in the rest of one, reaches nobody through the oracle either."""
    if place.device != "cpu":
        return
    for requests in (MIXED, DECODES):
        case = Case(place, requests, 64, 6, 2, int8=int8)
        case.tables.clamp_(max=case.tables[case.tables < 2**30].max().item())
        case.check(
            reference.paged_attention(
                case.q, case.k, case.v, case.tables, case.query_starts, case.context_lens, case.is_decode,
                case.scale,
            )
        )  # fmt: skip


@pytest.mark.parametrize("int8", ["", "kv"])
@pytest.mark.parametrize("window", [None, 50])
def test_reference_rows_do_not_depend_on_the_piece_of_the_prompt(place: Place, int8: str, window: int | None) -> None:
    """To the bit: a prompt in pieces, or behind keys that were there, rounds as the whole one."""
    if place.device != "cpu":
        return
    case = Case(place, [(200, 200)], 64, 6, 2, int8=int8, window=window)
    case.tables.clamp_(max=case.tables[case.tables < 2**30].max().item())

    def piece(first: int, last: int) -> Tensor:
        starts, contexts = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, last - first], [last]))
        y = reference.paged_attention(
            case.q[first:last], case.k, case.v, case.tables, starts, contexts, False, case.scale, None, window
        )
        return floats_of(y)

    whole = piece(0, 200)
    for cuts in ([64, 128], [2, 63, 65, 150], [100], [7, 11, 197]):
        edges = [0, *cuts, 200]
        assert torch.equal(torch.cat([piece(*edge) for edge in pairwise(edges)]), whole), cuts


def test_window_and_soft_cap_twins_fail(place: Place) -> None:
    for name, wrong in (("window", 17), ("window", 19), ("window", None), ("soft_cap", 2.1), ("soft_cap", None)):
        case = Case(place, MIXED, 64, 6, 2, window=18, soft_cap=2.0)
        right = getattr(case, name)
        setattr(case, name, wrong)
        got = case.run()
        setattr(case, name, right)
        with pytest.raises(AssertionError):
            case.check(got)


def test_wide_offsets(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache beyond 2**31 elements takes 64-bit offsets, to the same result."""
    case = Case(place, MIXED, 64, 6, 2, int8="v")
    want = case.run()
    monkeypatch.setattr(paging, "MAX_NARROW", 0)
    assert torch.equal(case.run(), want)


def test_heads_before_slots(place: Place) -> None:
    """A cache may keep a head's slots side by side."""
    case = Case(place, MIXED, 64, 6, 2)
    want = case.run()
    case.k = floats_of(case.k).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.run(), want)


def test_bad_shapes_are_named(place: Place) -> None:
    case = Case(place, [(1, 5)], 64, 4, 3)
    with pytest.raises(ValueError, match="4 query heads over 3 key heads"):
        case.run()
    case = Case(place, [(1, 5)], 64, 4, 2)
    case.v = floats_of(case.v).repeat_interleave(2, dim=3)[..., ::2]
    with pytest.raises(ValueError, match="cannot have strides"):
        case.run()
    case = Case(place, [(1, 3)], 64, 1024, 64)
    with pytest.raises(ValueError, match="K = 65536"):
        case.run(ToInt8())


def test_twins_fail(place: Place) -> None:
    def late(case: Case) -> None:
        case.context_lens -= (case.context_lens > 20).int()

    def shuffled(case: Case) -> None:
        case.tables[3, :2] = case.tables[3, :2].flip(0)

    def scaled(case: Case) -> None:
        case.scale *= 1.02

    def heads(case: Case) -> None:
        case.k = floats_of(case.k).flip(2)

    for corrupt in (late, shuffled, scaled, heads):
        case = Case(place, MIXED, 64, 6, 2)
        exact_scale = case.scale
        corrupt(case)
        got = case.run()
        case.scale = exact_scale
        with pytest.raises(AssertionError):
            case.check(got)


def test_int8_twins_fail(place: Place) -> None:
    def scaled(case: Case) -> None:
        codes_of(case.v).scale.mul_(1.02)

    def rolled(case: Case) -> None:
        block = case.tables[1, 0].long()
        scale = codes_of(case.k).scale
        scale[block] = scale[block].flip(0)

    def swapped(case: Case) -> None:
        codes = codes_of(case.k).codes
        codes.copy_(codes.flip(2))

    def unrounded(case: Case) -> None:
        case.multiplied = lambda q: q.double()  # type: ignore[method-assign]

    for corrupt in (scaled, rolled, swapped, unrounded):
        case = Case(place, MIXED, 64, 6, 2, int8="kv")
        # Sharper scores, which a rounded query moves by more than bfloat16's roundings of p and y.
        case.scale *= 8
        corrupt(case)
        with pytest.raises(AssertionError):
            case.check(case.run())


def test_quantized_output_twins_fail(place: Place) -> None:
    case = Case(place, DECODES, 64, 6, 2)
    want = quantize.quantize_rows(case.run())
    case.q[1] *= 1.1
    got = case.run(ToInt8())
    same = (got.codes == want.codes).all(1) & (got.scale == want.scale)
    assert same.tolist() == [True, False, True, True]
