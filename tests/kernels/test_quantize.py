"""Rows and tensors to int8, against IEEE division and rounding in torch."""

from __future__ import annotations

import pytest
import torch

from kernels import quantize, reference
from kernels.quantized import Quantized
from tests.support.kernel_checks import check_codes
from tests.support.places import Place

SMALL, LARGE = [(1, 64), (17, 100), (63, 576)], [(1, 4096), (1000, 4096), (129, 28672)]


def hostile(place: Place, T: int, K: int) -> torch.Tensor:
    """An outlier column, and in taller tensors a zero row, a tiny row and a row below the threshold of zero."""
    x = place.randn(T, K)
    x[:, K // 2] *= 300
    if T > 4:
        x[1], x[2] = 0, x[2] * 2.0**-12
        if place.dtype != torch.float16:
            x[3] = x[3] * 2.0**-110
    return x


def assert_same(got: Quantized, want: Quantized) -> None:
    """Equal bits. want comes from the CPU: on a GPU torch divides by 127 as a multiplication, an ulp off."""
    assert torch.equal(got.scale.cpu(), want.scale)
    assert torch.equal(got.codes.cpu(), want.codes)


def test_rows(place: Place) -> None:
    for T, K in place.shapes(SMALL, LARGE):
        x = hostile(place, T, K)
        got = quantize.quantize_rows(x)
        check_codes(got, x.double())
        assert_same(got, reference.quantize_rows(x.cpu()))


def test_rows_of_any_stride(place: Place) -> None:
    wide = place.randn(17, 300)
    for x in (wide[:, 3:211], wide.t(), wide[::2], wide[:, ::3]):
        assert_same(quantize.quantize_rows(x), reference.quantize_rows(x.cpu()))


def test_ties_go_to_even(place: Place) -> None:
    x = torch.arange(-127, 127.5, 0.5, device=place.device).to(place.dtype)[None]
    assert torch.equal(quantize.quantize_rows(x).codes.float(), x.float().round())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_shows_in_the_scale_of_its_row(place: Place, fault: float) -> None:
    x = place.randn(5, 100)
    x[2, 7] = fault
    x[4] = 0
    for codes, scale in (quantize.quantize_rows(x), reference.quantize_rows(x.cpu())):
        assert scale.isfinite().tolist() == [True, True, False, True, True]
        assert (scale[4].item(), codes[4].any().item()) == (1.0, False)
        assert codes.min().item() >= -127
    assert not quantize.quantize_tensor(x).scale.isfinite()


def test_tensor(place: Place) -> None:
    for T, K in place.shapes([*SMALL, (300, 64)], [*LARGE, (3, 100_000)]):
        x = hostile(place, T, K)
        assert_same(quantize.quantize_tensor(x), reference.quantize_tensor(x.cpu()))


def test_zero_tensor(place: Place) -> None:
    codes, scale = quantize.quantize_tensor(torch.zeros(5, 64, device=place.device, dtype=place.dtype))
    assert scale.tolist() == [1.0]
    assert not codes.any()


def test_static_scale_saturates(place: Place) -> None:
    scale = torch.tensor([0.01], device=place.device)
    x = place.randn(17, 100)
    x[3, 4], x[5, 6] = 1000, -1000
    got = quantize.quantize_tensor(x, scale)
    check_codes(got, x.double(), static=scale)
    assert torch.equal(got.codes, reference.quantize_tensor(x, scale).codes)
    assert (got.codes.min().item(), got.codes.max().item()) == (-128, 127)


@pytest.mark.parametrize("zero_point", [-128, -37, 0, 5, 127])
def test_zero_point(place: Place, zero_point: int) -> None:
    scale = torch.tensor([0.01], device=place.device)
    shift = torch.tensor([zero_point], dtype=torch.int8, device=place.device)
    x = place.randn(17, 100) + zero_point / -100
    x[3, 4], x[5, 6], x[7, 8] = 1000, -1000, 0
    got = quantize.quantize_tensor(x, scale, shift)
    assert_same(got, reference.quantize_tensor(x.cpu(), scale.cpu(), shift.cpu()))
    assert (got.codes[3, 4].item(), got.codes[5, 6].item(), got.codes[7, 8].item()) == (127, -128, zero_point)
    # In float64, of the quotient as float32 rounds it, since a tie is one of its values.
    exact = ((x.float() / scale).double().round() + zero_point).clamp(-128, 127)
    assert torch.equal(got.codes.double(), exact)
    other = quantize.quantize_tensor(x, scale, shift // 2 + 1)
    assert not torch.equal(got.codes, other.codes)


def test_zero_point_needs_a_scale(place: Place) -> None:
    x, shift = place.randn(3, 64), torch.ones(1, dtype=torch.int8, device=place.device)
    for op in (quantize.quantize_tensor, reference.quantize_tensor):
        with pytest.raises(ValueError, match="scale that is given"):
            op(x, None, shift)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_is_code_0_with_a_zero_point(place: Place) -> None:
    x = place.randn(3, 64)
    x[1, 5] = float("nan")
    scale, shift = torch.ones(1, device=place.device), torch.full((1,), 9, dtype=torch.int8, device=place.device)
    for op in (quantize.quantize_tensor, reference.quantize_tensor):
        assert op(x, scale, shift).codes[1, 5] == 0


def test_no_rows(place: Place) -> None:
    codes, scale = quantize.quantize_rows(place.randn(3, 64)[:0])
    assert codes.shape == (0, 64)
    assert scale.shape == (0,)


def test_too_long_a_row_is_named(place: Place) -> None:
    with pytest.raises(ValueError, match=r"K = 40000 .* limit is 32768"):
        quantize.quantize_rows(place.randn(1, 40_000))


def test_twins_fail(place: Place) -> None:
    x = hostile(place, 17, 100)
    codes, scale = quantize.quantize_rows(x)
    check_codes(Quantized(codes, scale), x.double())
    off_by_one = codes.clone()
    off_by_one[4, 5] += 1 if codes[4, 5] < 127 else -1
    for twin in (Quantized(codes, scale.roll(1)), Quantized(codes.roll(1, 1), scale), Quantized(off_by_one, scale)):
        with pytest.raises(AssertionError):
            check_codes(twin, x.double())
