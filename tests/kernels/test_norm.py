"""RMSNorm and LayerNorm with every switch, against the equations in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import norm
from kernels.quantized import Quantized, ToInt8
from tests.support.kernel_checks import check_codes, check_float, codes_of
from tests.support.places import Place

SMALL, LARGE = [(1, 64), (17, 100), (63, 576)], [(1, 4096), (1000, 4096), (65, 14336), (17, 16384)]
EPS = 1e-5


def exact_rms(h: Tensor, weight: Tensor) -> Tensor:
    h = h.double()
    return h / (h.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def exact_layer(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    h = h.double()
    centred = h - h.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


def operands(place: Place, T: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with an outlier column and a zero row (zero in the residual too), residual, weight, bias."""
    x, residual, weight, bias = place.randn(T, K), place.randn(T, K + 1)[:, 1:], place.randn(K), place.randn(K + 2)[2:]
    x[:, K // 3] *= 100
    if T > 1:
        x[1] = residual[1] = 0
    return x, residual, weight, bias


def check(got: Tensor | Quantized, want: Tensor, place: Place, quantize: ToInt8 | None) -> None:
    if quantize is None:
        check_float(got, want, place.dtype)
    else:
        check_codes(got, want, quantize.scale)


@pytest.mark.parametrize("output", ["float", "row", "tensor"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norms(place: Place, output: str, with_residual: bool) -> None:
    static = torch.tensor([0.02], device=place.device)
    quantize = {"float": None, "row": ToInt8(), "tensor": ToInt8(static)}[output]
    for T, K in place.shapes(SMALL, LARGE):
        x, residual, weight, bias = operands(place, T, K)
        h = x + residual if with_residual else x
        extra = residual if with_residual else None
        y, got_h = norm.rms_norm(x, weight, EPS, extra, quantize)
        assert torch.equal(got_h, h)
        check(y, exact_rms(h, weight), place, quantize)
        for b in (bias, None):
            y, got_h = norm.layer_norm(x, weight, b, EPS, extra, quantize)
            assert torch.equal(got_h, h)
            check(y, exact_layer(h, weight, b), place, quantize)


def test_without_residual_h_is_x(place: Place) -> None:
    x = place.randn(3, 64)
    assert norm.rms_norm(x, place.randn(64), EPS)[1] is x


def test_columns_apart(place: Place) -> None:
    x, weight = place.randn(100, 17).t(), place.randn(100)
    check(norm.rms_norm(x, weight, EPS)[0], exact_rms(x, weight), place, None)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_shows_in_the_scale_of_its_row(place: Place) -> None:
    x, weight = place.randn(3, 100), place.randn(100)
    x[1, 50] = float("nan")
    for y, _ in (norm.rms_norm(x, weight, EPS, None, ToInt8()), norm.layer_norm(x, weight, None, EPS, x, ToInt8())):
        assert codes_of(y).scale.isfinite().tolist() == [True, False, True]


def test_bad_shapes_are_named(place: Place) -> None:
    with pytest.raises(ValueError, match=r"K = 16385 .* limit is 16384"):
        norm.rms_norm(place.randn(1, 16385), place.randn(16385), EPS)
    with pytest.raises(ValueError, match="must have x's shape"):
        norm.rms_norm(place.randn(3, 64), place.randn(64), EPS, place.randn(2, 64))


def test_twins_fail(place: Place) -> None:
    x, _, weight, bias = operands(place, 17, 100)
    y, _ = norm.layer_norm(x, weight, bias, EPS)
    codes = codes_of(norm.rms_norm(x, weight, EPS, None, ToInt8())[0])
    off = 1 + max(1e-5, 4 * torch.finfo(place.dtype).eps)
    wrong: list[Callable[[], None]] = [
        lambda: check_float(y, exact_layer(x, weight, None), place.dtype),
        lambda: check_float(y, exact_layer(x, weight.roll(1), bias), place.dtype),
        lambda: check_float(y, exact_layer(x, weight, bias) * off, place.dtype),
        lambda: check_float(norm.rms_norm(x, weight, EPS)[0], exact_layer(x, weight, None), place.dtype),
        lambda: check_codes(codes, exact_rms(x.roll(1, 0), weight)),
        lambda: check_codes(Quantized(codes.codes, codes.scale.roll(1)), exact_rms(x, weight)),
    ]
    for twin in wrong:
        with pytest.raises(AssertionError):
            twin()
