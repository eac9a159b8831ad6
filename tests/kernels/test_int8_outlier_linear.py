"""Outlier columns found, left out of the codes and multiplied in float: exact where the arithmetic is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import gemm, outliers, reference
from kernels.quantized import Outliers, Quantized
from tests.support.kernel_checks import FLOAT32_SLACK, check_float
from tests.support.places import Place

THRESHOLD = 6.0
# (T, N, K, outlier columns): none, one, all, more than one step, more rows than one program reads.
SMALL = [(1, 40, 64, 0), (1, 300, 100, 3), (3, 40, 64, 64), (17, 24, 200, 1), (40, 136, 96, 37)]
LARGE = [(1, 4096, 4096, 7), (16, 4096, 14336, 20), (17, 1000, 4096, 6), (2049, 6144, 4096, 9)]


def activation(place: Place, T: int, K: int, num_outliers: int) -> Tensor:
    """Values below the threshold but in some columns, which are above it in one row alone."""
    x = place.randn(T, K).clamp(-5.9, 5.9)
    for i, column in enumerate(outlier_columns(K, num_outliers)):
        x[i % T, column] = 8.0 + i % 50 if i % 2 else -6.0
    return x


def outlier_columns(K: int, num_outliers: int) -> list[int]:
    """Both ends and some between; rising."""
    return sorted({i * (K - 1) // max(1, num_outliers - 1) for i in range(num_outliers)})


def operands(place: Place, T: int, N: int, K: int, num_outliers: int) -> dict[str, Any]:
    return {
        "x": activation(place, T, K, num_outliers),
        "weight_q": place.codes(N, K),
        "weight_scale": (place.randn(N, dtype=torch.float32).abs() + 0.5) * K**-0.5 / 50,
        "bias": place.randn(N),
        "residual": place.randn(T, N),
    }


def listed(found: Outliers) -> list[int]:
    columns: list[int] = found.columns[: int(found.num_columns)].tolist()
    return columns


def check(got: Tensor, case: dict[str, Any], columns: list[int], dtype: torch.dtype) -> None:
    """got is the int8 part of the codes that the op must have found, rounded to dtype, plus the float part."""
    x, scale = case["x"].double(), case["weight_scale"].double()
    is_outlier = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    is_outlier[columns] = True
    codes, x_scale = reference.quantize_rows(case["x"].masked_fill(is_outlier, 0).cpu())
    weight = case["weight_q"].double() * scale.reshape(-1, 1)
    terms = [codes.to(x.device).double() * x_scale.to(x.device).double()[:, None] @ weight.t()]
    terms += [case[name].double().expand_as(terms[0]) for name in ("bias", "residual") if case[name] is not None]
    rounded = sum(terms).abs()
    magnitude = sum(term.abs() for term in terms) + x[:, is_outlier].abs() @ weight[:, is_outlier].abs().t()
    terms.append(x[:, is_outlier] @ weight[:, is_outlier].t())
    slack = magnitude * FLOAT32_SLACK / torch.finfo(dtype).eps * 2
    check_float(got, sum(terms), dtype, rounded=rounded + slack)


def test_linear(place: Place) -> None:
    for T, N, K, num_outliers in place.shapes(SMALL, LARGE):
        case = operands(place, T, N, K, num_outliers)
        got = outliers.int8_outlier_linear(**case, out_dtype=place.dtype, threshold=THRESHOLD)
        check(got, case, outlier_columns(K, num_outliers), place.dtype)


def test_reference_linear(place: Place) -> None:
    for T, N, K, num_outliers in SMALL:
        case = {name: value.cpu() for name, value in operands(place, T, N, K, num_outliers).items()}
        got = reference.int8_outlier_linear(**case, out_dtype=place.dtype, threshold=THRESHOLD)
        check(got, case, outlier_columns(K, num_outliers), place.dtype)


def test_columns_are_found_and_left_out(place: Place) -> None:
    for T, _, K, num_outliers in place.shapes(SMALL, LARGE):
        x = activation(place, T, K, num_outliers)
        columns = outlier_columns(K, num_outliers)
        codes, found = outliers.split_outliers(x, THRESHOLD)
        want, on_cpu = reference.split_outliers(x.cpu(), THRESHOLD)
        assert listed(found) == listed(on_cpu) == columns
        kept = x.cpu().clone()
        kept[:, columns] = 0
        exact = reference.quantize_rows(kept)
        for got in (codes, want):
            assert torch.equal(got.codes.cpu(), exact.codes)
            assert torch.equal(got.scale.cpu(), exact.scale)


def test_both_parts_are_exact(place: Place) -> None:
    """Whole numbers below the threshold whose largest is 127 scales, and outliers that float32 holds, sum exactly."""
    T, N, K, columns = 19, 40, 96, [0, 31, 95]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (T, K), generator=generator).float() / 32
    x[:, 5] = 127 / 32
    x[::3, columns] = 64.0
    weight = torch.randint(-7, 8, (N, K), generator=generator, dtype=torch.int8)
    weight_scale = 2.0 ** torch.randint(-2, 3, (N,), generator=generator)
    want = x.double() @ (weight * weight_scale[:, None]).double().t()
    operands = x.to(place.dtype), weight, weight_scale
    for op, device in ((outliers.int8_outlier_linear, place.device), (reference.int8_outlier_linear, "cpu")):
        x, weight, weight_scale = (tensor.to(device) for tensor in operands)
        got = op(x, weight, weight_scale, out_dtype=torch.float32, threshold=THRESHOLD)
        assert torch.equal(got.double().cpu(), want)
        one = op(x, weight, weight_scale[:1].contiguous(), out_dtype=torch.float32, threshold=THRESHOLD)
        assert torch.equal(one.double().cpu(), x.double().cpu() @ weight.double().cpu().t() * weight_scale[0].item())


def test_without_outliers_it_is_the_int8_product(place: Place) -> None:
    case = operands(place, 17, 300, 96, 0)
    x_q, found = outliers.split_outliers(case["x"], THRESHOLD)
    assert listed(found) == []
    want = gemm.int8_linear(**(case | {"x": x_q}), out_dtype=place.dtype)
    assert torch.equal(outliers.int8_outlier_linear(**case, out_dtype=place.dtype), want)


def test_threshold_itself_is_an_outlier(place: Place) -> None:
    x = torch.zeros(2, 64, device=place.device, dtype=place.dtype)
    x[0, 3], x[1, 9], x[1, 11] = 6.0, -6.0, torch.tensor(6.0).to(place.dtype) * (1 - torch.finfo(place.dtype).eps)
    for op in (outliers.split_outliers, reference.split_outliers):
        codes, found = op(x, THRESHOLD)
        assert listed(found) == [3, 9]
        assert codes.codes.nonzero().tolist() == [[1, 11]]
        assert codes.scale[0] == 1


def test_every_epilogue(place: Place) -> None:
    full = operands(place, 17, 300, 96, 5)
    for change in ({"bias": None}, {"residual": None}, {"weight_scale": full["weight_scale"][:1]}):
        case = full | change
        got = outliers.int8_outlier_linear(**case, out_dtype=place.dtype)
        check(got, case, outlier_columns(96, 5), place.dtype)


def test_activation_of_any_stride(place: Place) -> None:
    case = operands(place, 17, 40, 96, 5)
    want = outliers.int8_outlier_linear(**case)
    wide = torch.cat([case["x"], case["x"]], dim=1)
    for x in (wide[:, 96:], case["x"].t().contiguous().t()):
        assert torch.equal(outliers.int8_outlier_linear(**(case | {"x": x})), want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("T", [3, 40])
def test_a_fault_shows_in_its_row_alone(place: Place, fault: float, T: int) -> None:
    case = operands(place, T, 40, 96, 2)
    case["x"][1, 7] = fault
    on_cpu = {name: value.cpu() for name, value in case.items()}
    for op, operands_of in ((outliers.int8_outlier_linear, case), (reference.int8_outlier_linear, on_cpu)):
        is_finite = op(**operands_of, out_dtype=place.dtype).isfinite()
        assert not is_finite[1].any()
        assert is_finite.sum() == (T - 1) * 40


def test_no_rows(place: Place) -> None:
    case = operands(place, 3, 40, 96, 2)
    none = case | {"x": case["x"][:0], "residual": None}
    assert outliers.int8_outlier_linear(**none).shape == (0, 40)
    on_cpu = none | {name: none[name].cpu() for name in ("x", "weight_q", "weight_scale", "bias")}
    assert reference.int8_outlier_linear(**on_cpu).shape == (0, 40)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [3, 40])
def test_a_replayed_graph_finds_the_outliers_of_its_own_step(T: int) -> None:
    """Captured over rows without outliers, replayed over rows with some and over rows with others."""
    place = Place("cuda", torch.float16)
    case = operands(place, T, 40, 96, 0)
    outliers.int8_outlier_linear(**case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outliers.int8_outlier_linear(**case)
    for num_outliers in (5, 37, 0):
        case["x"].copy_(activation(place, T, 96, num_outliers))
        graph.replay()
        check(captured, case, outlier_columns(96, num_outliers), place.dtype)


def test_too_long_a_row_is_named(place: Place) -> None:
    with pytest.raises(ValueError, match=r"K = 40000 .* limit is 32768"):
        outliers.split_outliers(place.randn(1, 40_000), THRESHOLD)


def test_twins_fail(place: Place) -> None:
    case = operands(place, 17, 300, 96, 5)
    columns = outlier_columns(96, 5)
    got = outliers.int8_outlier_linear(**case, out_dtype=place.dtype)
    for change in ({"weight_scale": case["weight_scale"].roll(1)}, {"bias": None}, {"x": case["x"].roll(1, 0)}):
        with pytest.raises(AssertionError):
            check(got, case | change, columns, place.dtype)
    for wrong in (columns[1:], [*columns, 2]):
        with pytest.raises(AssertionError):
            check(got, case, wrong, place.dtype)


def test_quantizing_all_is_another_result(place: Place) -> None:
    """What the method is for: with the outliers among the codes, the others lose their bits."""
    case = operands(place, 17, 40, 96, 5) | {"bias": None, "residual": None}
    exact = case["x"].double() @ (case["weight_q"] * case["weight_scale"][:, None]).double().t()
    split = outliers.int8_outlier_linear(**case, out_dtype=torch.float32)
    whole = gemm.int8_linear(**(case | {"x": Quantized(*reference.quantize_rows(case["x"]))}), out_dtype=torch.float32)
    assert isinstance(whole, Tensor)
    assert (split - exact).norm() < 0.5 * (whole - exact).norm()
