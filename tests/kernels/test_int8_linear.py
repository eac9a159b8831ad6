"""The int8 product bit for bit, and the Linear around it against float64, for every kind of tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import gemm, tiles
from kernels.quantized import Quantized
from tests.support.kernel_checks import FLOAT32_SLACK, check_float
from tests.support.places import TILES, Place

SMALL = [(1, 40, 64), (17, 300, 200), (63, 72, 576)]
LARGE = [(t, 1000, 4096) for t in (1, 16, 17, 33, 65, 129, 257, 1025)] + [(2049, 6144, 4096), (7, 28672, 1024)]


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """[T, N] in float64, which holds any int8 dot product exactly."""
    return x.double() @ weight.double().t()


def operands(place: Place, T: int, N: int, K: int) -> dict[str, Any]:
    return {
        "x": Quantized(place.codes(T, K), place.randn(T, dtype=torch.float32).abs() / 50),
        "weight_q": place.codes(N, K),
        "weight_scale": place.randn(N, dtype=torch.float32).abs() / 100,
        "bias": place.randn(N),
        "residual": place.randn(T, N),
    }


def exact_terms(
    x: Quantized, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None
) -> list[Tensor]:
    """The summands of y in float64."""
    product = exact_product(x.codes, weight_q) * x.scale.double().reshape(-1, 1) * weight_scale.double()
    return [product] + [extra.double().expand_as(product) for extra in (bias, residual) if extra is not None]


def check(got: Tensor, terms: list[Tensor], dtype: torch.dtype) -> None:
    """As check_float, with the float32 error of each summand: they may cancel."""
    slack = sum((term.abs() for term in terms[1:]), terms[0].abs()) * FLOAT32_SLACK / torch.finfo(dtype).eps * 2
    check_float(got, sum(terms[1:], terms[0]), dtype, rounded=slack)


def test_accumulator_is_exact(place: Place, tile: None) -> None:
    for T, N, K in place.shapes(SMALL, LARGE):
        x, weight = place.codes(T, K), place.codes(N, K)
        got = gemm.int8_matmul(x, weight)
        assert got.dtype == torch.int32
        assert torch.equal(got.double(), exact_product(x, weight))


def test_largest_accumulator(place: Place) -> None:
    x = torch.full((1, 40_000), 127, dtype=torch.int8, device=place.device)
    assert gemm.int8_matmul(x, -x).item() == -40_000 * 127 * 127


def test_linear(place: Place, tile: None) -> None:
    for T, N, K in place.shapes(SMALL, LARGE):
        case = operands(place, T, N, K)
        check(gemm.int8_linear(**case, out_dtype=place.dtype), exact_terms(**case), place.dtype)


@pytest.mark.parametrize("kind", ["plain", "swapped", "split epilogue"])
def test_every_epilogue(place: Place, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "choose", lambda *_: TILES[kind])
    full = operands(place, 17, 300, 96)
    per_tensor = {"x": Quantized(full["x"].codes, full["x"].scale[:1]), "weight_scale": full["weight_scale"][:1]}
    for change in ({"bias": None}, {"residual": None}, {"bias": None, "residual": None}, per_tensor):
        case = full | change
        check(gemm.int8_linear(**case, out_dtype=place.dtype), exact_terms(**case), place.dtype)


def test_operands_apart(place: Place) -> None:
    case = operands(place, 17, 40, 96)
    case["x"] = Quantized(place.codes(96, 17).t(), case["x"].scale)
    case["residual"] = place.randn(17, 80)[:, ::2]
    check(gemm.int8_linear(**case, out_dtype=place.dtype), exact_terms(**case), place.dtype)


def test_a_row_does_not_depend_on_its_batch(place: Place) -> None:
    case = operands(place, 65, 300, 200)
    batch = gemm.int8_linear(**case, out_dtype=place.dtype)
    for row in (slice(0, 1), slice(40, 57)):
        alone = case | {"x": Quantized(*(part[row] for part in case["x"])), "residual": case["residual"][row]}
        assert torch.equal(gemm.int8_linear(**alone, out_dtype=place.dtype), batch[row])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_in_a_scale_reaches_its_row(place: Place) -> None:
    case = operands(place, 3, 40, 64)
    case["x"].scale[1] = float("inf")
    assert gemm.int8_linear(**case).isfinite().any(-1).tolist() == [True, False, True]


def test_no_rows(place: Place) -> None:
    assert gemm.int8_matmul(place.codes(3, 64)[:0], place.codes(40, 64)).shape == (0, 40)


def test_bad_operands_are_named(place: Place) -> None:
    case = operands(place, 3, 40, 64)
    wrong: dict[str, dict[str, Any]] = {
        "contiguous": {"weight_q": place.codes(40, 128)[:, ::2]},
        r"must be \[N, 64\]": {"weight_q": place.codes(40, 32)},
        "2 rows and 40 columns": {"x": Quantized(case["x"].codes, case["x"].scale[:2])},
        "bias has 39": {"bias": case["bias"][:39]},
        r"residual \(2, 40\)": {"residual": case["residual"][:2]},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            gemm.int8_linear(**(case | change))
    deep = torch.zeros(1, gemm.MAX_DEPTH + 1, dtype=torch.int8, device=place.device)
    with pytest.raises(ValueError, match="the limit is 131071"):
        gemm.int8_matmul(deep, deep)


def test_twins_fail(place: Place) -> None:
    case = operands(place, 17, 300, 200)
    got = gemm.int8_linear(**case, out_dtype=place.dtype)
    one_code = case["weight_q"].clone()
    one_code[5, 7] = -one_code[5, 7] if one_code[5, 7] else 1
    wrong: list[dict[str, Any]] = [
        {"bias": None},
        {"residual": None},
        {"x": Quantized(case["x"].codes, case["x"].scale.roll(1))},
        {"weight_scale": case["weight_scale"].roll(1)},
        {"weight_scale": case["weight_scale"] * (1 + max(1e-4, 4 * torch.finfo(place.dtype).eps))},
        {"bias": case["bias"].roll(1)},
        {"weight_q": one_code},
    ]
    for change in wrong:
        with pytest.raises(AssertionError):
            check(got, exact_terms(**(case | change)), place.dtype)


def test_kernels_are_not_specialized_on_tokens() -> None:
    for kernel in (gemm._int8_linear_kernel, gemm._int8_linear_swapped_kernel):
        options = getattr(kernel, "do_not_specialize", None) or kernel.kwargs["do_not_specialize"]
        assert "T" in options


def test_default_tiles_cover_every_bucket() -> None:
    for capability in (80, 86, 89, 90, 100, 120):
        for t in range(1, 9000, 37):
            tile = tiles.choose(tiles.Target("untuned", capability), 4096, 4096, t)
            assert all(size & (size - 1) == 0 for size in (tile.block_t, tile.block_n, tile.block_k))
