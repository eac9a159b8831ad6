"""Scales per row and 128 columns: read by the product, written by its epilogue, against float64 and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError

from kernels import blocks, gemm, reference
from kernels.epilogue import Epilogue
from kernels.quantized import BLOCK, Quantized, ToInt8
from kernels.tiles import Tile
from tests.support.kernel_checks import FLOAT32_SLACK, check_float
from tests.support.places import Place

# One block, a tail of a block, unaligned rows; y of one block, of a tail, of tiles beyond its end.
SMALL = [(1, 40, 128), (17, 300, 200), (5, 520, 384), (3, 256, 77)]
LARGE = [(t, 1000, 4096) for t in (1, 16, 17, 65, 129, 1025)] + [(2049, 6144, 4096), (7, 28672, 1024)]
TILES = {
    "default": None,
    "plain": Tile("plain", 16, 32, BLOCK, num_warps=4, num_stages=2, group=2),
    "swapped": Tile("swapped", 16, 64, BLOCK, num_warps=4, num_stages=2),
    "wide": Tile("plain", 32, 256, BLOCK, num_warps=8, num_stages=2),
}
WIDE = [Tile(kernel, 16, 256, BLOCK, num_warps=8, num_stages=2) for kernel in ("plain", "swapped")]


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile kind in place of the default."""
    use(TILES[request.param], monkeypatch)


def use(chosen: Tile | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if chosen is not None:
        monkeypatch.setattr(gemm, "block_tile", lambda *_: chosen)


def operands(place: Place, T: int, N: int, K: int) -> dict[str, Any]:
    """Scales that differ fourfold between the blocks of a row; gates of a few units."""
    num_blocks = -(-K // BLOCK)
    return {
        "x": Quantized(place.codes(T, K), place.randn(T, num_blocks, dtype=torch.float32).abs() / 50 + 0.01),
        "weight_q": place.codes(N, K),
        "weight_scale": place.randn(N, dtype=torch.float32).abs() * K**-0.5 / 50,
        "bias": place.randn(N),
        "residual": place.randn(T, N),
    }


def gated(case: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in case.items() if name != "residual"}


def by_row(case: dict[str, Any]) -> dict[str, Any]:
    """The same operands with x's first scale of each row as the only one."""
    return case | {"x": Quantized(case["x"].codes, case["x"].scale[:, 0].contiguous())}


def exact_terms(case: dict[str, Any]) -> list[Tensor]:
    """The summands of y in float64, which holds the int32 sum of every block exactly."""
    codes, scale = case["x"]
    per_column = scale.double().repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]
    product = (codes.double() * per_column) @ case["weight_q"].double().t() * case["weight_scale"].double()
    extras = (case.get(name) for name in ("bias", "residual"))
    return [product] + [extra.double().expand_as(product) for extra in extras if extra is not None]


def check(got: Tensor, case: dict[str, Any], dtype: torch.dtype) -> None:
    """As check_float, with the float32 error of each summand, which may cancel: the blocks' sums among them."""
    terms = exact_terms(case)
    codes, scale = case["x"]
    largest = codes.double().abs() * scale.double().repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]
    magnitude = largest @ case["weight_q"].double().abs().t() * case["weight_scale"].double()
    slack = (magnitude + sum(term.abs() for term in terms[1:])) * FLOAT32_SLACK / torch.finfo(dtype).eps * 2
    check_float(got, sum(terms[1:], terms[0]), dtype, rounded=slack)


def check_blocks(got: Quantized, y: Tensor, slack: float = 2.0**-18) -> None:
    """got holds y (float32 or more) as the reference rounds it: scales to rounding, codes apart only at ties."""
    want = reference.quantize_blocks(y.float().cpu())
    assert got.codes.dtype == torch.int8
    assert got.codes.shape == want.codes.shape
    assert got.scale.shape == want.scale.shape
    assert bool(((got.scale.cpu() - want.scale).abs() <= slack * want.scale).all()), "scale"
    ratio = y.double().cpu() / want.scale.double().repeat_interleave(BLOCK, dim=1)[:, : y.shape[1]]
    distance = (got.codes.cpu().double() - ratio).abs().max().item()
    assert distance <= 0.5 + 127 * 2 * slack + 1e-3, f"a code is {distance:.4f} from its value"


def equal(got: Quantized, want: Quantized) -> bool:
    return torch.equal(got.codes, want.codes) and torch.equal(got.scale, want.scale)


def test_reference_rounds_each_block_as_a_row(place: Place) -> None:
    x = place.randn(5, 300).cpu()
    x[2, 130:] = 0
    codes, scale = reference.quantize_blocks(x)
    for block in range(3):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        assert equal(Quantized(codes[:, columns], scale[:, block]), reference.quantize_rows(x[:, columns]))
    assert scale.shape == (5, 3)
    assert scale[2, 2] == 1


def test_linear(place: Place, tile: None) -> None:
    for T, N, K in place.shapes(SMALL, LARGE):
        case = operands(place, T, N, K)
        check(gemm.int8_linear(**case, out_dtype=place.dtype), case, place.dtype)


def test_sums_of_a_block_are_exact(place: Place, tile: None) -> None:
    """With scales of one, and codes that make the largest sums, y is the integer."""
    T, N, K = 17, 40, 640
    x = torch.full((T, K), 127, dtype=torch.int8, device=place.device)
    weight = x[:1].expand(N, K).contiguous()
    weight[::2] *= -1
    weight[:, 5] = place.codes(N, 1)[:, 0]
    ones = torch.ones(N, device=place.device)
    got = gemm.int8_linear(Quantized(x, torch.ones(T, 5, device=place.device)), weight, ones, out_dtype=torch.float32)
    assert torch.equal(got.double(), x.double() @ weight.double().t())


def test_reference_linear(place: Place) -> None:
    case = operands(place, 130, 300, 200)
    on_cpu = {k: Quantized(*(t.cpu() for t in v)) if isinstance(v, Quantized) else v.cpu() for k, v in case.items()}
    check(reference.int8_linear(**on_cpu, out_dtype=place.dtype), on_cpu, place.dtype)
    y = reference.int8_linear(**on_cpu, out_dtype=torch.float32)
    assert equal(reference.int8_linear(**on_cpu, is_blocked=True), reference.quantize_blocks(y))
    y = reference.int8_gated_linear(**gated(on_cpu), out_dtype=torch.float32)
    got = reference.int8_gated_linear(**gated(on_cpu), quantize=ToInt8(is_blocked=True))
    assert equal(got, reference.quantize_blocks(y))


def test_blocks_of_y(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in (None, Tile("plain", 16, BLOCK, BLOCK, 4, 2), *WIDE):
        use(chosen, monkeypatch)
        for T, N, K in place.shapes(SMALL, LARGE):
            case = operands(place, T, N, K)
            for form in (case, by_row(case)):
                y = gemm.int8_linear(**form, out_dtype=torch.float32)
                check_blocks(gemm.int8_linear(**form, is_blocked=True), y)


def test_blocks_of_gated_y(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in (None, *WIDE):
        use(chosen, monkeypatch)
        for T, N, K in place.shapes(SMALL, LARGE):
            case = gated(operands(place, T, N, K))
            for form in (case, by_row(case)):
                y = gemm.int8_gated_linear(**form, out_dtype=torch.float32)
                check_blocks(gemm.int8_gated_linear(**form, quantize=ToInt8(is_blocked=True)), y)


def test_scale_of_the_tensor_leaves_no_trace_beyond_the_end(place: Place) -> None:
    """Columns past the end repeat the last one, and with one weight scale nothing makes them zero."""
    case = gated(operands(place, 3, 300, 128)) | {"bias": None}
    case["weight_q"][:-2] //= 16
    case |= {"weight_scale": case["weight_scale"][:1]}
    y = gemm.int8_gated_linear(**case, out_dtype=torch.float32)
    check_blocks(gemm.int8_gated_linear(**case, quantize=ToInt8(is_blocked=True)), y)


def test_the_next_linear_eats_them(place: Place) -> None:
    case = gated(operands(place, 17, 512, 200))
    hidden = gemm.int8_gated_linear(**case, quantize=ToInt8(is_blocked=True))
    down = operands(place, 17, 40, 256) | {"x": hidden}
    check(gemm.int8_linear(**down, out_dtype=place.dtype), down, place.dtype)


def test_a_row_has_the_same_bits_in_every_tile(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    case = operands(place, 65, 300, 520)
    results = []
    for chosen in (*TILES.values(), *WIDE):
        use(chosen, monkeypatch)
        results.append(gemm.int8_linear(**case, out_dtype=torch.float32))
    assert all(torch.equal(result, results[0]) for result in results)
    to = ToInt8(is_blocked=True)
    results = []
    for chosen in WIDE:
        use(chosen, monkeypatch)
        results.append(gemm.int8_gated_linear(**gated(case), quantize=to))
    assert equal(*results)


def test_a_row_does_not_depend_on_its_batch(place: Place) -> None:
    case = operands(place, 65, 300, 520)
    batch, to = gemm.int8_linear(**case, out_dtype=place.dtype), ToInt8(is_blocked=True)
    batch_q = gemm.int8_gated_linear(**gated(case), quantize=to)
    for row in (slice(0, 1), slice(40, 57)):
        alone = case | {"x": Quantized(*(part[row] for part in case["x"])), "residual": case["residual"][row]}
        assert torch.equal(gemm.int8_linear(**alone, out_dtype=place.dtype), batch[row])
        assert equal(gemm.int8_gated_linear(**gated(alone), quantize=to), Quantized(*(part[row] for part in batch_q)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_shows_in_the_scales_of_its_row(place: Place) -> None:
    case = gated(operands(place, 3, 512, 256))
    case["x"].scale[1, 1] = float("nan")
    codes, scale = gemm.int8_gated_linear(**case, quantize=ToInt8(is_blocked=True))
    assert scale.isfinite().all(-1).tolist() == [True, False, True]
    down = operands(place, 3, 40, 256) | {"x": Quantized(codes, scale)}
    assert gemm.int8_linear(**down).isfinite().any(-1).tolist() == [True, False, True]


def test_zero_block(place: Place) -> None:
    case = gated(operands(place, 3, 512, 256)) | {"bias": None}
    case["weight_q"][256:] = 0
    codes, scale = gemm.int8_gated_linear(**case, quantize=ToInt8(is_blocked=True))
    assert not codes[:, BLOCK:].any()
    assert (scale[:, 1] == 1).all()


def test_no_rows(place: Place) -> None:
    case = gated(operands(place, 3, 512, 256))
    case["x"] = Quantized(*(part[:0] for part in case["x"]))
    codes, scale = gemm.int8_gated_linear(**case, quantize=ToInt8(is_blocked=True))
    assert codes.shape == (0, 256)
    assert scale.shape == (0, 2)


def test_bad_operands_are_named(place: Place) -> None:
    case = operands(place, 3, 40, 200)
    for scale in (case["x"].scale[:, :1], case["x"].scale[:2], case["x"].scale.t()):
        wrong = case | {"x": Quantized(case["x"].codes, scale)}
        with pytest.raises(ValueError, match=r"x.scale \(\d, \d\) must be \(3, 2\)"):
            gemm.int8_linear(**wrong)
    one = torch.ones(1, device=place.device)
    with pytest.raises(ValueError, match="give one"):
        gemm.int8_linear(**case, out_scale=one, is_blocked=True)
    with pytest.raises(ValueError, match="scale must be None"):
        ToInt8(one, is_blocked=True)


def test_twins_fail(place: Place) -> None:
    case = operands(place, 17, 300, 520)
    got = gemm.int8_linear(**case, out_dtype=place.dtype)
    codes, scale = case["x"]
    shifted, next_row = Quantized(codes, scale.roll(1, dims=1)), Quantized(codes, scale.roll(1, dims=0))
    for change in ({"x": shifted}, {"x": next_row}, {"bias": None}, {"weight_scale": case["weight_scale"].roll(1)}):
        with pytest.raises(AssertionError):
            check(got, case | change, place.dtype)
    y = gemm.int8_gated_linear(**gated(case), out_dtype=torch.float32)
    codes, scale = gemm.int8_gated_linear(**gated(case), quantize=ToInt8(is_blocked=True))
    flipped = codes.clone()
    flipped[3, 7] += 1 if flipped[3, 7] < 0 else -1
    for twin in (Quantized(codes, scale.roll(1, dims=1)), Quantized(codes, scale * 1.0001), Quantized(flipped, scale)):
        with pytest.raises(AssertionError):
            check_blocks(twin, y)


def test_default_tiles_hold_whole_blocks() -> None:
    for capability in (80, 86, 89, 90, 100, 120):
        for t in (1, 16, 17, 64, 65, 4096):
            for k in (4096, 200):
                assert blocks.block_tile(capability, k, t).block_k == BLOCK
                for reads_blocks in (True, False):
                    for width in (BLOCK, 2 * BLOCK):
                        tile = blocks.block_tile(capability, k, t, reads_blocks, width)
                        assert tile.block_n == width
                        assert tile.num_stages >= 2
                        assert tile.block_k == BLOCK or not reads_blocks


def test_a_tile_of_half_a_block_is_refused(place: Place) -> None:
    case = by_row(operands(place, 3, 256, 128))
    y, scale = torch.empty(3, 256, dtype=torch.int8), torch.empty(3, 2)
    ops = Epilogue(case["x"].scale, case["weight_scale"], block_scale=scale.to(place.device))
    with pytest.raises((InterpreterError, CompilationError)):
        gemm.launch(case["x"].codes, case["weight_q"], ops, y.to(place.device), Tile("plain", 16, 64, BLOCK, 4, 2))


def test_kernel_is_not_specialized_on_tokens() -> None:
    kernel = blocks._int8_linear_blocks_kernel
    options = getattr(kernel, "do_not_specialize", None) or kernel.kwargs["do_not_specialize"]
    assert "T" in options
