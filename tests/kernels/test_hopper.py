"""Hopper's own kernels: the same bits as the plain kernel, whatever the tile. They have no interpreter."""

from __future__ import annotations

from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention, decode_step, dequantize, gemm
from kernels.epilogue import Epilogue
from kernels.hopper import common, decode, prefill
from kernels.paging import paged_layout
from kernels.quantize import quantize_rows
from kernels.quantized import Quantized, ToInt8
from kernels.tiles import Tile, current_gpu
from tests.support.kernel_checks import codes_of, floats_of
from tests.support.places import Place

PLAIN = Tile("plain", 128, 128, 128, num_warps=4, num_stages=3)
TILES = [
    Tile("pingpong", 128, 128, 128, num_warps=4, num_stages=4),
    Tile("pingpong", 128, 128, 128, num_warps=4, num_stages=4, group=1),
    Tile("pingpong", 64, 128, 128, num_warps=4, num_stages=7),
    Tile("pingpong", 128, 64, 128, num_warps=4, num_stages=6),
    Tile("pingpong", 64, 64, 128, num_warps=4, num_stages=8),
    Tile("cooperative", 128, 256, 128, num_warps=4, num_stages=4),
    Tile("cooperative", 128, 256, 128, num_warps=4, num_stages=3, group=1),
    Tile("cooperative", 128, 128, 128, num_warps=4, num_stages=5),
    Tile("stream", 16, 32, 128, num_warps=4, num_stages=16),
    Tile("stream", 32, 32, 128, num_warps=4, num_stages=6),
    Tile("stream", 64, 128, 128, num_warps=8, num_stages=5),
    Tile("stream", 16, 64, 128, num_warps=4, num_stages=20),
    Tile("stream", 32, 64, 128, num_warps=4, num_stages=12),
    Tile("stream", 64, 64, 128, num_warps=4, num_stages=6),
]
STREAMS = [tile for tile in TILES if tile.kernel == "stream"]
# One tile, one tile more than there are programs, tails in each direction, one step of K, and fewer steps than stages.
SHAPES = [(1, 128, 128), (17, 4096, 14336), (1000, 6144, 4096), (129, 80, 576), (2049, 2064, 80), (8192, 1536, 1024)]


@pytest.fixture
def place() -> Place:
    if not torch.cuda.is_available() or current_gpu(torch.device("cuda", 0)).capability != 90:
        pytest.skip("wgmma is Hopper's")
    return Place("cuda", torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tile", TILES, ids=lambda tile: f"{tile.kernel}-{tile.block_t}x{tile.block_n}x{tile.num_stages}"
)
def test_same_bits_as_the_plain_kernel(place: Place, tile: Tile) -> None:
    for T, N, K in SHAPES:
        for dtype in (torch.float16, torch.bfloat16):
            x, weight = place.codes(T, K), place.codes(N, K)
            a, b = (place.randn(size, dtype=torch.float32).abs() / 100 for size in (T, N))
            for ops in (Epilogue(a, b), Epilogue(a, b, place.randn(N)), Epilogue(a[:1], b[:1])):
                for is_gated in (False, True):
                    got, want = (torch.empty(T, N // (1 + is_gated), dtype=dtype, device="cuda") for _ in range(2))
                    gemm.launch(x, weight, ops, got, tile, is_gated)
                    gemm.launch(x, weight, ops, want, PLAIN, is_gated)
                    assert torch.equal(got.view(torch.int16), want.view(torch.int16)), (T, N, K, dtype, is_gated)


@pytest.mark.gpu
def test_row_max(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tile reaches beyond the last column by half and more, and where it has more rows than there are."""
    for T, N in ((1000, 6144), (1000, 6272), (333, 2064), (1, 6272)):
        x = Quantized(place.codes(T, 512), place.randn(T, dtype=torch.float32).abs() / 50)
        case = x, place.codes(N, 512), place.randn(N, dtype=torch.float32).abs() / 1000
        monkeypatch.setattr(gemm, "choose", lambda *_: PLAIN)
        want = codes_of(gemm.int8_gated_linear(*case, quantize=ToInt8()))
        for tile in TILES:
            monkeypatch.setattr(gemm, "choose", lambda *_, tile=tile: tile)
            got = codes_of(gemm.int8_gated_linear(*case, quantize=ToInt8()))
            assert torch.equal(got.codes, want.codes), (T, N, tile)
            assert torch.equal(got.scale, want.scale), (T, N, tile)


@pytest.mark.gpu
def test_a_chain_of_streams_waits_for_its_inputs(place: Place) -> None:
    """Each product starts while the one before it runs, and reads what that one writes."""
    weights = [place.codes(4096, 4096) for _ in range(8)]
    scale = torch.full((4096,), 2e-4, device="cuda")

    def run(tile: Tile, T: int) -> list[Tensor]:
        x, done = quantize_rows(start[:T]), []
        for weight in weights:
            y = torch.full((T, 4096), float("nan"), dtype=torch.float16, device="cuda")
            gemm.launch(x.codes, weight, Epilogue(x.scale, scale), y, tile)
            x = quantize_rows(y)
            done.append(y)
        return done

    start = place.randn(64, 4096)
    for T, tile in product((1, 16, 33, 64), STREAMS):
        want = run(PLAIN, T)
        graph = torch.cuda.CUDAGraph()
        run(tile, T)
        with torch.cuda.graph(graph):
            got = run(tile, T)
        for _ in range(20):
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_twin_fails(place: Place) -> None:
    x, weight, scale = place.codes(256, 512), place.codes(256, 512), torch.ones(256, device="cuda") / 1000
    got, want = (torch.empty(256, 256, dtype=torch.float16, device="cuda") for _ in range(2))
    gemm.launch(x, weight, Epilogue(scale, scale), want, PLAIN)
    weight[77, 300] += 1 if weight[77, 300] < 127 else -1
    for tile in TILES:
        gemm.launch(x, weight, Epilogue(scale, scale), got, tile)
        assert not torch.equal(got, want)


def test_what_it_cannot_do_is_left_to_the_plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    y, scale = torch.empty(8, 16, dtype=torch.float16), torch.empty(8)
    x, weight = torch.empty(8, 64, dtype=torch.int8), torch.empty(16, 64, dtype=torch.int8)
    full = Epilogue(scale, scale)
    assert common.can_copy(x, weight, full, y)
    for case in (
        (x[:, :56], weight, full, y),
        (x, weight, Epilogue(), y),
        (x, weight, full._replace(residual=y), y),
        (x, weight, full, y.float()),
        (x, weight, full, y[:, :12]),
        (torch.empty(8 * 64 + 1, dtype=torch.int8)[1:].view(8, 64), weight, full, y),
    ):
        assert not common.can_copy(*case)
    for tile in TILES:
        monkeypatch.setattr(gemm, "choose", lambda *_, tile=tile: tile)
        assert gemm.pick_tile(x, weight, full, y) == tile
        assert gemm.pick_tile(x, weight, full, y.float()) == gemm.fallback(tile)


def decodes(place: Place, contexts: list[int], int8: str, D: int = 128, block_size: int = 32) -> tuple[Any, ...]:
    """Queries, caches and where they are: of 8 query heads over 2 key heads."""
    order = torch.randperm(len(contexts) * 64).view(len(contexts), 64).to("cuda", torch.int32)
    shape = (len(contexts) * 64, block_size, 2)

    def cache(name: str) -> Tensor | Quantized:
        heads = place.randn(shape[0] * block_size * 2, D)
        if name not in int8:
            return heads.view(*shape, D)
        codes, scale = quantize_rows(heads)
        return Quantized(codes.view(*shape, D), scale.view(shape))

    starts = torch.arange(len(contexts) + 1, dtype=torch.int32, device="cuda")
    lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    return place.randn(len(contexts), 8, D), cache("k"), cache("v"), order, starts, lengths, True, D**-0.5


@pytest.mark.gpu
@pytest.mark.parametrize("int8", ["", "kv"])
def test_decodes_are_hoppers_own(place: Place, int8: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits that other programs add up leave all counts at zero, in a graph that is replayed as well."""
    made: list[decode.WarpParts] = []
    parts_of = decode._parts

    def noted(*args: Any) -> decode.WarpParts:
        made.append(parts_of(*args))
        return made[-1]

    monkeypatch.setattr(decode, "_parts", noted)
    case = decodes(place, [1, 300, 2000], int8)
    want = attention.paged_attention(*case)
    assert isinstance(want, Tensor)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention.paged_attention(*case)
    assert isinstance(got, Tensor)
    for _ in range(20):
        graph.replay()
        assert torch.equal(got, want)
    assert len(made) == 2
    for parts in made:
        assert parts.arrivals is not None
        assert not parts.arrivals.any()
    monkeypatch.setattr(decode, "ENOUGH_PROGRAMS", 1)
    assert torch.equal(floats_of(attention.paged_attention(*case)), want)
    assert len(made) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("int8", ["", "kv"])
def test_a_fault_in_a_split_is_not_hidden(place: Place, int8: str) -> None:
    q, k, v, order, *rest = decodes(place, [700, 700], int8)
    values = v.scale if isinstance(v, Quantized) else v
    values[order[0, 650 // 32], 650 % 32, 1] = float("nan")
    y = attention.paged_attention(q, k, v, order, *rest)
    assert isinstance(y, Tensor)
    assert y[0, 4 * 128 :].isnan().all()
    assert y[0, : 4 * 128].isfinite().all()
    assert y[1].isfinite().all()


PROMPTS = [
    [(64, 64)],
    [(2, 2), (3, 67)],
    [(33, 33), (1, 9), (5, 100), (0, 0), (700, 711)],
    [(31, 31), (32, 64), (33, 65), (63, 127), (65, 129)],
    [(128, 2000), (2048, 2048)],
    [(68, 272)],
]
"""(rows, context) of each request: ends of tiles and behind them, beside decodes, a request without rows, and one that
fills the room for dequantized keys, whose last tile reaches beyond it."""


def prompts(
    place: Place, requests: list[tuple[int, int]], D: int, H: int, G: int, block_size: int = 64, int8: str = ""
) -> tuple[Any, ...]:
    """Queries, caches and where they are; whatever lies behind a context is NaN."""
    width = max(-(-context // block_size) for _, context in requests) + 1
    tables = 1 + torch.randperm(len(requests) * width).view(len(requests), width).to("cuda", torch.int32)
    shape = (len(requests) * width + 1, block_size, G)
    heads = torch.full((2, *shape, D), float("nan"), dtype=place.dtype, device="cuda")
    for (_, context), table in zip(requests, tables.tolist(), strict=True):
        for first in range(0, context, block_size):
            filled = min(block_size, context - first)
            heads[:, table[first // block_size], :filled] = place.randn(2, filled, G, D)
    caches = [
        Quantized(*(x.view(*shape, -1).squeeze(-1) for x in quantize_rows(each.view(-1, D)))) if int8 else each
        for each in heads
    ]
    starts = torch.tensor([0, *accumulate(rows for rows, _ in requests)], dtype=torch.int32, device="cuda")
    contexts = torch.tensor([context for _, context in requests], dtype=torch.int32, device="cuda")
    return place.randn(int(starts[-1]), H, D), *caches, tables, starts, contexts, False, D**-0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("D", "H", "G"), [(128, 32, 8), (64, 32, 8), (128, 6, 2), (128, 4, 4), (128, 64, 1)])
@pytest.mark.parametrize("requests", PROMPTS, ids=lambda requests: str(sum(rows for rows, _ in requests)))
def test_prompts_have_the_bits_of_every_gpus_kernel(
    place: Place, requests: list[tuple[int, int]], D: int, H: int, G: int, dtype: torch.dtype, monkeypatch: Any
) -> None:
    """Of a float cache, and of an int8 cache whose keys are dequantized before; the kernel is what ran."""
    ran: list[bool] = []

    def noted(*args: Any) -> None:
        ran.append(True)
        prefill.prefill_on_hopper(*args)

    monkeypatch.setattr(attention, "starts_early", lambda *_: False)
    monkeypatch.setattr(dequantize, "MIN_TOKENS", 1)
    for int8, block_size in (("", 64), ("", 128), ("kv", 16)):
        case = prompts(Place("cuda", dtype), requests, D, H, G, block_size, int8)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "suits_prefill", lambda _: False)
            want = attention.paged_attention(*case)
        ran.clear()
        with monkeypatch.context() as patch:
            patch.setattr(attention, "prefill_on_hopper", noted)
            got = attention.paged_attention(*case)
        assert isinstance(want, Tensor)
        assert isinstance(got, Tensor)
        assert ran == [True]
        assert want.isfinite().all()
        assert torch.equal(got.view(torch.int16), want.view(torch.int16)), (int8, block_size)


@pytest.fixture
def own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float cache of a test is for Hopper's own kernel."""

    def surely(step: decode_step.Operands) -> bool:
        assert prefill.suits_prefill(step)
        return True

    monkeypatch.setattr(attention, "suits_prefill", surely)


@pytest.mark.gpu
@pytest.mark.usefixtures("own_prompts")
def test_a_prompt_without_a_key_ends(place: Place) -> None:
    """No step has one; the plain kernel writes zeros."""
    q, k, v, tables, starts, _, *rest = prompts(place, [(100, 100), (50, 60)], 128, 8, 2)
    y = attention.paged_attention(q, k, v, tables, starts, starts[1:] * 0, *rest)
    assert isinstance(y, Tensor)
    torch.cuda.synchronize()
    assert y.isnan().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("own_prompts")
def test_a_fault_in_a_prompt_stays_with_it(place: Place) -> None:
    """A value that is not finite reaches all rows that see it, and no other request; one that no row sees, nobody."""
    q, k, v, tables, *rest = prompts(place, [(200, 200), (300, 300)], 128, 8, 2)
    clean = attention.paged_attention(q, k, v, tables, *rest)
    assert isinstance(clean, Tensor)
    assert clean.isfinite().all()
    v[tables[0, 1], 20, 1] = float("nan")
    y = attention.paged_attention(q, k, v, tables, *rest)
    assert isinstance(y, Tensor)
    assert y[64 + 20 : 200, 4 * 128 :].isnan().all()
    assert torch.equal(y[:64], clean[:64])
    assert torch.equal(y[:, : 4 * 128], clean[:, : 4 * 128])
    assert torch.equal(y[200:], clean[200:])


@pytest.mark.gpu
@pytest.mark.usefixtures("own_prompts")
def test_prompts_in_a_graph(place: Place) -> None:
    """A captured launch fits any step of its shapes: it finds the requests of the step that is there."""
    q, k, v, tables, starts, contexts, *rest = prompts(place, [(100, 300), (100, 700), (56, 56)], 128, 8, 2)
    attention.paged_attention(q, k, v, tables, starts, contexts, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention.paged_attention(q, k, v, tables, starts, contexts, *rest)
    assert isinstance(got, Tensor)
    for lengths, keys in (((100, 100, 56), (300, 700, 56)), ((30, 170, 56), (30, 690, 56)), ((250, 0, 6), (290, 0, 6))):
        starts.copy_(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
        contexts.copy_(torch.tensor(keys, dtype=torch.int32))
        want = attention.paged_attention(q, k, v, tables, starts, contexts, *rest)
        assert isinstance(want, Tensor)
        for _ in range(20):
            graph.replay()
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("own_prompts")
def test_a_wrong_key_shows(place: Place) -> None:
    q, k, v, tables, *rest = prompts(place, [(500, 500)], 128, 8, 2)
    want = attention.paged_attention(q, k, v, tables, *rest)
    k[tables[0, 3], 7, 1, 5] += 8
    got = attention.paged_attention(q, k, v, tables, *rest)
    assert isinstance(want, Tensor)
    assert isinstance(got, Tensor)
    assert torch.equal(got[: 3 * 64 + 7], want[: 3 * 64 + 7])
    assert torch.equal(got[:, : 4 * 128], want[:, : 4 * 128])
    assert not torch.equal(got[3 * 64 + 7 :], want[3 * 64 + 7 :])


def test_what_suits_the_kernel_of_prompts() -> None:
    def suits(D: int = 128, H: int = 8, G: int = 2, block_size: int = 64, **changes: Any) -> bool:
        dtype = changes.get("dtype", torch.float16)
        k, v = torch.zeros(2, 4, block_size, G, D + changes.get("gap", 0), dtype=changes.get("cache", dtype))
        k, v = k[..., :D], v[..., :D]
        if "int8" in changes:
            k = Quantized(k.to(torch.int8), torch.ones(k.shape[:-1]))
        layout = paged_layout(H, k, v, changes.get("window"), changes.get("soft_cap"))
        ints, q = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, H, D, dtype=dtype)
        requests = decode_step.Requests(ints, ints[0], ints[0])
        return prefill.suits_prefill(attention._operands(q, k, v, requests, 1.0, layout))

    assert suits()
    assert suits(64, 12, 2, 256, dtype=torch.bfloat16)
    for wrong in (
        {"D": 256}, {"D": 96}, {"H": 256}, {"block_size": 32}, {"dtype": torch.float32}, {"cache": torch.bfloat16},
        {"int8": True}, {"window": 100}, {"soft_cap": 30.0}, {"gap": 8},
    ):  # fmt: skip
        assert not suits(**wrong), wrong


def test_what_suits_the_kernel_of_decodes() -> None:
    def suits(D: int = 128, H: int = 8, G: int = 2, block_size: int = 16, **changes: Any) -> bool:
        dtype, int8 = changes.get("dtype", torch.float16), changes.get("int8", "")

        def cache(name: str) -> Tensor | Quantized:
            shape = (4, block_size, G, D)
            if name not in int8:
                return torch.zeros(shape, dtype=changes.get("cache", dtype))
            return Quantized(torch.zeros(shape, dtype=torch.int8), torch.ones(shape[:-1]))

        k, v = cache("k"), cache("v")
        layout = paged_layout(H, k, v, changes.get("window"), changes.get("soft_cap"))
        ints = torch.zeros(2, 4, dtype=torch.int32)
        q = torch.zeros(2, H, D, dtype=dtype)
        return decode.suits_hopper(
            attention._operands(q, k, v, decode_step.Requests(ints, ints[0], ints[0]), 1.0, layout)
        )

    assert suits()
    assert suits(64, 16, 2, 64, dtype=torch.bfloat16, int8="kv")
    for wrong in (
        {"D": 256}, {"D": 96}, {"H": 18}, {"block_size": 8}, {"dtype": torch.float32}, {"cache": torch.bfloat16},
        {"int8": "k"}, {"int8": "v"}, {"window": 100}, {"soft_cap": 30.0},
    ):  # fmt: skip
        assert not suits(**wrong), wrong
