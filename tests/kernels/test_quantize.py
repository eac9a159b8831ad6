"""Rows and tensors to int8, against IEEE division and rounding in torch."""

from __future__ import annotations

import pytest
import torch

from kernels import quantize, reference
from kernels.quantized import Quantized
from tests.kernels.checks import check_codes
from tests.kernels.conftest import Place

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
    codes, scale = quantize.quantize_rows(x)
    assert scale.isfinite().tolist() == [True, True, False, True, True]
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
    assert (got.codes.min().item(), got.codes.max().item()) == (-127, 127)


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
