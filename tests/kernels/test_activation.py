"""SiLU-gated product, GELU and ReLU, against the equations in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import activation
from kernels.quantized import Quantized, ToInt8
from tests.support.kernel_checks import check_codes, check_float, codes_of, floats_of
from tests.support.places import Place

SMALL, LARGE = [(1, 64), (17, 100), (63, 577)], [(1, 14336), (1000, 4096), (65, 14336)]


def exact_silu_mul(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def exact_gelu_mul(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return exact_gelu_tanh(gate) * up


def exact_gelu(x: Tensor) -> Tensor:
    x = x.double()
    return 0.5 * x * torch.erfc(-x / math.sqrt(2))


def exact_gelu_tanh(x: Tensor) -> Tensor:
    x = x.double()
    return x / (1 + (-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).exp())


OPS: dict[str, tuple[Callable[..., Tensor | Quantized], Callable[[Tensor], Tensor]]] = {
    "silu_mul": (activation.silu_mul, exact_silu_mul),
    "gelu_mul": (activation.gelu_mul, exact_gelu_mul),
    "gelu": (lambda x, quantize=None: activation.gelu(x, "none", quantize), exact_gelu),
    "gelu_tanh": (lambda x, quantize=None: activation.gelu(x, "tanh", quantize), exact_gelu_tanh),
    "relu": (activation.relu, lambda x: x.double().clamp(min=0)),
}


GATED = ("silu_mul", "gelu_mul")


def hostile(place: Place, op: str, T: int, K: int) -> Tensor:
    x = 3 * place.randn(T, 2 * K if op in GATED else K)
    x[:, K // 2] *= 10
    if T > 1:
        x[1] = 0
    return x


@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_activations(place: Place, op: str) -> None:
    run, exact = OPS[op]
    static = torch.tensor([0.02], device=place.device)
    for T, K in place.shapes(SMALL, LARGE):
        x = hostile(place, op, T, K)
        want = exact(x)
        check_float(run(x), want, place.dtype)
        check_codes(run(x, quantize=ToInt8()), want)
        check_codes(run(x, quantize=ToInt8(static)), want, static)


@pytest.mark.parametrize("op", OPS)
def test_rows_apart(place: Place, op: str) -> None:
    run, exact = OPS[op]
    wide = place.randn(9, 200)
    for x in (wide[:, 10:150], wide.t()[:, :8], wide[::2]):
        check_float(run(x), exact(x), place.dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_is_not_hidden(place: Place, op: str) -> None:
    run, _ = OPS[op]
    x = place.randn(3, 100)
    x[1, 30] = float("nan")
    assert floats_of(run(x)).isfinite().all(-1).tolist() == [True, False, True]
    assert codes_of(run(x, quantize=ToInt8())).scale.isfinite().tolist() == [True, False, True]


def test_too_long_a_row_is_named(place: Place) -> None:
    with pytest.raises(ValueError, match=r"K = 16385 .* limit is 16384"):
        activation.gelu(place.randn(1, 16385), quantize=ToInt8())
    with pytest.raises(ValueError, match=r"K = 32769 .* limit is 32768"):
        activation.silu_mul(place.randn(1, 65538), ToInt8())
    with pytest.raises(ValueError, match=r"K = 32769 .* limit is 32768"):
        activation.gelu_mul(place.randn(1, 65538), ToInt8())
    check_float(activation.relu(place.randn(1, 40_000)), place.randn(1, 40_000).double().clamp(min=0), place.dtype)


def test_twins_fail(place: Place) -> None:
    x = place.randn(17, 200)
    silu, gelu = floats_of(activation.silu_mul(x)), activation.gelu(x, "none")
    codes = codes_of(activation.gelu(x, "tanh", ToInt8()))
    halves_swapped = torch.cat((x[:, 100:], x[:, :100]), dim=1)
    wrong: list[Callable[[], None]] = [
        lambda: check_float(silu, exact_silu_mul(halves_swapped), place.dtype),
        lambda: check_float(silu.roll(1, 0), exact_silu_mul(x), place.dtype),
        lambda: check_float(silu, exact_gelu_mul(x), place.dtype),
        lambda: check_float(activation.gelu_mul(x), exact_gelu_mul(halves_swapped), place.dtype),
        lambda: check_float(gelu, exact_gelu_tanh(x) if place.dtype == torch.float32 else x.double(), place.dtype),
        lambda: check_codes(codes, exact_gelu_tanh(x.roll(1, 1))),
        lambda: check_codes(Quantized(codes.codes, codes.scale.roll(1)), exact_gelu_tanh(x)),
    ]
    for twin in wrong:
        with pytest.raises(AssertionError):
            twin()
