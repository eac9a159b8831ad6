"""Hopper's own kernels: the same bits as the plain kernel, whatever the tile. They have no interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import gemm
from kernels.epilogue import Epilogue
from kernels.hopper import common
from kernels.quantize import quantize_rows
from kernels.quantized import Quantized, ToInt8
from kernels.tiles import Tile, current_gpu
from tests.support.kernel_checks import codes_of
from tests.support.places import Place

PLAIN = Tile("plain", 128, 128, 128, num_warps=4, num_stages=3)
TILES = [
    Tile("pingpong", 128, 128, 128, num_warps=4, num_stages=4),
    Tile("pingpong", 128, 128, 128, num_warps=4, num_stages=4, group=1),
    Tile("pingpong", 64, 128, 128, num_warps=4, num_stages=7),
    Tile("pingpong", 128, 64, 128, num_warps=4, num_stages=6),
    Tile("pingpong", 64, 64, 128, num_warps=4, num_stages=8),
    Tile("stream", 16, 64, 128, num_warps=4, num_stages=20),
    Tile("stream", 32, 64, 128, num_warps=4, num_stages=12),
    Tile("stream", 64, 64, 128, num_warps=4, num_stages=6),
]
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
    x = Quantized(place.codes(1000, 512), place.randn(1000, dtype=torch.float32).abs() / 50)
    case = x, place.codes(6144, 512), place.randn(6144, dtype=torch.float32).abs() / 1000
    monkeypatch.setattr(gemm, "choose", lambda *_: PLAIN)
    want = codes_of(gemm.int8_gated_linear(*case, quantize=ToInt8()))
    for tile in TILES:
        monkeypatch.setattr(gemm, "choose", lambda *_, tile=tile: tile)
        got = codes_of(gemm.int8_gated_linear(*case, quantize=ToInt8()))
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scale, want.scale)


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
    for T, tile in ((1, TILES[-3]), (16, TILES[-3]), (33, TILES[-2]), (64, TILES[-1])):
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
        assert gemm.pick_tile(x, weight, full, y.float()) == gemm.FALLBACKS[tile.kernel]
