"""Sums over ranks with the norm behind them, by ranks of one process that take turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import norm, reference
from kernels.collectives import all_reduce_rms_norm, reduce_scatter_rms_norm
from kernels.quantized import Quantized, ToInt8
from tests.support.kernel_checks import check_codes, check_float, codes_of
from tests.support.peers import EPS, Op, in_turn, local_peers, owned
from tests.support.places import Place

SHAPES: list[tuple[int, int]] = [(1, 64), (5, 100), (7, 576)]
LARGE: list[tuple[int, int]] = [(64, 4096), (300, 8192)]
OPS: dict[str, Op] = {"all-reduce": all_reduce_rms_norm, "reduce-scatter": reduce_scatter_rms_norm}

pytestmark = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def operands(place: Place, size: int, T: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Summands with an outlier column and a row that adds up to zero, residual and weight."""
    parts, residual, weight = place.randn(size, T, K), place.randn(T, K + 1)[:, 1:], place.randn(K)
    parts[:, :, K // 3] *= 100
    if T > 1:
        parts[:, 1] = residual[1] = 0
    return parts, residual, weight


def summed(parts: Tensor) -> Tensor:
    """In float32, in the order of the ranks, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


def exact(h: Tensor, weight: Tensor) -> Tensor:
    h = h.double()
    return h / (h.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("output", ["float", "row", "tensor"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_get_the_norm_of_the_sum(op: Op, place: Place, output: str, size: int) -> None:
    """Within roundings of float64, and to the bit what the sum in the order of ranks and the plain norm give."""
    static = torch.tensor([0.02], device=place.device)
    quantize = {"float": None, "row": ToInt8(), "tensor": ToInt8(static)}[output]
    for T, K in place.shapes(SHAPES, LARGE):
        parts, residual, weight = operands(place, size, T, K)
        for extra in (residual, None):
            ranks = local_peers(op, size, T + 3, K, parts.element_size(), place.device)
            found = in_turn(op, ranks, parts, weight, extra, quantize)
            h = summed(parts) if extra is None else summed(parts) + extra
            plain, _ = norm.rms_norm(summed(parts), weight, EPS, extra, quantize)
            want_h = reference.all_reduce_rms_norm(parts, weight, EPS, extra, quantize)[1]
            assert torch.equal(want_h, h)
            for rank, (y, got_h) in enumerate(found):
                rows = owned(rank, size, T) if op is reduce_scatter_rms_norm else slice(None)
                assert torch.equal(got_h[rows], h[rows])
                if quantize is None:
                    check_float(y, exact(h, weight), place.dtype)
                    assert isinstance(plain, Tensor)
                    assert torch.equal(y, plain)  # type: ignore[arg-type]
                else:
                    check_codes(y, exact(h, weight), quantize.scale)
                    assert torch.equal(codes_of(y).codes, codes_of(plain).codes)
                    assert torch.equal(codes_of(y).scale, codes_of(plain).scale)


def test_rows_that_are_nobodys_are_left_alone(op: Op, place: Place) -> None:
    parts, residual, weight = operands(place, 2, 5, 64)
    ranks = local_peers(op, 2, 8, 64, parts.element_size(), place.device)
    in_turn(op, ranks, parts, weight, residual, ToInt8())
    assert [peers.generations.tolist() for peers in ranks] == [[1] * 5 + [0] * 3] * 2
    if op is reduce_scatter_rms_norm:
        # The residual of the first rank's rows is read, that of the second's is not.
        residual[3:] = float("nan")
        y, h = in_turn(op, ranks, parts, weight, residual, ToInt8())[0]
        assert h[:3].isfinite().all()
        assert codes_of(y).scale[:3].isfinite().all()
        assert not codes_of(y).scale[3:].isfinite().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_of_one_rank_shows_in_the_scale_of_its_row_everywhere(op: Op, place: Place) -> None:
    parts, residual, weight = operands(place, 2, 3, 100)
    parts[1, 1, 50] = float("inf")
    ranks = local_peers(op, 2, 3, 100, parts.element_size(), place.device)
    for y, _ in in_turn(op, ranks, parts, weight, residual, ToInt8()):
        assert codes_of(y).scale.isfinite().tolist() == [True, False, True]


def test_bad_shapes_are_named(op: Op, place: Place) -> None:
    (peers, _) = local_peers(op, 2, 4, 64, place.dtype.itemsize, place.device)
    with pytest.raises(ValueError, match="5 rows of 64 are to be exchanged, and the ranks have memory for 4 of 64"):
        op(place.randn(5, 64), peers, place.randn(64), EPS)
    with pytest.raises(ValueError, match="must have x's shape"):
        op(place.randn(3, 64), peers, place.randn(64), EPS, place.randn(2, 64))
    with pytest.raises(ValueError, match=r"K = 16385 .* limit is 16384"):
        op(place.randn(1, 16385), peers._replace(width=16385), place.randn(16385), EPS)


def test_twins_fail(op: Op, place: Place) -> None:
    parts, residual, weight = operands(place, 3, 6, 100)
    ranks = local_peers(op, 3, 6, 100, parts.element_size(), place.device)
    codes = codes_of(in_turn(op, ranks, parts, weight, residual, ToInt8())[1][0])
    codes = Quantized(codes.codes.clone(), codes.scale.clone())
    h = summed(parts) + residual
    wrong: list[Callable[[], None]] = [
        lambda: check_codes(codes, exact(summed(parts), weight)),
        lambda: check_codes(codes, exact(summed(parts[:2]) + residual, weight)),
        lambda: check_codes(codes, exact(summed(parts[[0, 0, 1]]) + residual, weight)),
        lambda: check_codes(codes, exact(h.roll(1, 0), weight)),
        lambda: check_codes(Quantized(codes.codes, codes.scale.roll(1)), exact(h, weight)),
    ]
    check_codes(codes, exact(h, weight))
    for twin in wrong:
        with pytest.raises(AssertionError):
            twin()
