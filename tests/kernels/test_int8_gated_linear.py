"""The gated Linear, gate and quantization included, against float64 and against its two steps taken one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import gemm, quantize, reference
from kernels.quantized import Quantized, ToInt8
from tests.support.kernel_checks import check_codes, check_float, codes_of, floats_of
from tests.support.places import Place

SMALL = [(1, 40, 64), (17, 300, 200), (63, 72, 576)]
LARGE = [(t, 2000, 4096) for t in (1, 16, 33, 129, 257, 1025)] + [(2049, 6144, 1024), (7, 28672, 1024)]


def operands(place: Place, T: int, N: int, K: int) -> dict[str, Any]:
    """Scaled so that gates lie on both sides of zero, at a few units."""
    return {
        "x": Quantized(place.codes(T, K), place.randn(T, dtype=torch.float32).abs() / 50),
        "weight_q": place.codes(N, K),
        "weight_scale": place.randn(N, dtype=torch.float32).abs() * K**-0.5 / 50,
        "bias": place.randn(N),
    }


def exact(x: Quantized, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y in float64."""
    z = x.codes.double() @ weight_q.double().t() * x.scale.double().reshape(-1, 1) * weight_scale.double()
    z = z if bias is None else z + bias.double()
    gate, up = z[:, ::2], z[:, 1::2]
    return gate / (1 + (-gate).exp()) * up


def check(got: Tensor | Quantized, want: Tensor, dtype: torch.dtype) -> None:
    """As check_float: z, a few units, is right to 2**-19 of itself, and y moves at most (1 + |up|) as much."""
    slack = want.abs().amax() * 2.0**-17 / torch.finfo(dtype).eps * 2
    check_float(got, want, dtype, rounded=slack.expand_as(want))


def test_gated(place: Place, tile: None) -> None:
    for T, N, K in place.shapes(SMALL, LARGE):
        case = operands(place, T, N, K)
        check(gemm.int8_gated_linear(**case, out_dtype=place.dtype), exact(**case), place.dtype)


def test_reference(place: Place) -> None:
    case = operands(place, 150, 300, 200)
    on_cpu: dict[str, Any] = {
        k: Quantized(*(t.cpu() for t in v)) if isinstance(v, Quantized) else v.cpu() for k, v in case.items()
    }
    check(reference.int8_gated_linear(**on_cpu, out_dtype=place.dtype), exact(**on_cpu), place.dtype)
    y = floats_of(reference.int8_gated_linear(**on_cpu, out_dtype=place.dtype))
    codes, scale = reference.int8_gated_linear(**on_cpu, out_dtype=place.dtype, quantize=ToInt8())
    want = reference.quantize_rows(y)
    assert torch.equal(codes, want.codes)
    assert torch.equal(scale, want.scale)


def test_codes_are_those_of_the_rounded_result(place: Place, tile: None) -> None:
    for T, N, K in place.shapes(SMALL, LARGE):
        case = operands(place, T, N, K)
        y = floats_of(gemm.int8_gated_linear(**case, out_dtype=place.dtype))
        got = codes_of(gemm.int8_gated_linear(**case, out_dtype=place.dtype, quantize=ToInt8()))
        want = quantize.quantize_rows(y)
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scale, want.scale)
        static = torch.tensor([0.03], device=place.device)
        check_codes(gemm.int8_gated_linear(**case, out_dtype=place.dtype, quantize=ToInt8(static)), y.double(), static)


def test_no_bias_and_scales_of_the_tensor(place: Place) -> None:
    case = operands(place, 17, 300, 96) | {"bias": None}
    check(gemm.int8_gated_linear(**case, out_dtype=place.dtype), exact(**case), place.dtype)
    case |= {"x": Quantized(case["x"].codes, case["x"].scale[:1]), "weight_scale": case["weight_scale"][:1]}
    check(gemm.int8_gated_linear(**case, out_dtype=place.dtype), exact(**case), place.dtype)


def test_a_row_does_not_depend_on_its_batch(place: Place) -> None:
    case = operands(place, 65, 300, 200)
    batch = codes_of(gemm.int8_gated_linear(**case, out_dtype=place.dtype, quantize=ToInt8()))
    for row in (slice(0, 1), slice(40, 57)):
        alone = case | {"x": Quantized(*(part[row] for part in case["x"]))}
        codes, scale = gemm.int8_gated_linear(**alone, out_dtype=place.dtype, quantize=ToInt8())
        assert torch.equal(codes, batch.codes[row])
        assert torch.equal(scale, batch.scale[row])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_shows_in_the_scale_of_its_row(place: Place) -> None:
    case = operands(place, 3, 40, 64)
    case["x"].scale[1] = float("nan")
    got = codes_of(gemm.int8_gated_linear(**case, quantize=ToInt8()))
    assert got.scale.isfinite().tolist() == [True, False, True]


def test_no_rows(place: Place) -> None:
    case = operands(place, 3, 40, 64)
    case["x"] = Quantized(*(part[:0] for part in case["x"]))
    codes, scale = gemm.int8_gated_linear(**case, quantize=ToInt8())
    assert codes.shape == (0, 20)
    assert scale.shape == (0,)


def test_odd_rows_of_weights_are_refused(place: Place) -> None:
    case = operands(place, 3, 41, 64)
    with pytest.raises(ValueError, match="41 rows"):
        gemm.int8_gated_linear(**case)


def test_twins_fail(place: Place) -> None:
    case = operands(place, 17, 300, 200)
    got = gemm.int8_gated_linear(**case, out_dtype=place.dtype)
    swapped = case["weight_q"].view(-1, 2, 200).flip(1).reshape(300, 200)
    wrong = [
        {"bias": None},
        {"bias": case["bias"].roll(1)},
        {"x": Quantized(case["x"].codes, case["x"].scale.roll(1))},
        {"weight_scale": case["weight_scale"].roll(1)},
        {"weight_q": swapped},
    ]
    for change in wrong:
        with pytest.raises(AssertionError):
            check(got, exact(**(case | change)), place.dtype)
