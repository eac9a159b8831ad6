"""Scales per group of the weight's columns: the exact product where float32 sums are exact, else against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import groups, reference
from kernels.quantized import MIN_GROUP, Quantized
from kernels.tiles import Tile
from tests.support.kernel_checks import FLOAT32_SLACK, check_float
from tests.support.places import Place

# (T, N, K, group size): one group, several, a tile's end within N and T, groups of more than one step.
SMALL = [(1, 40, 32, 32), (17, 300, 192, 64), (5, 136, 384, 128), (3, 56, 512, 256), (2, 24, 1024, 512)]
LARGE = [(t, 1000, 4096, 128) for t in (1, 16, 17, 65, 129, 1025)] + [(2049, 6144, 4096, 64), (7, 4096, 14336, 256)]
KINDS: dict[str, tuple[int, int] | None] = {
    "default": None,
    "narrow": (16, 32),
    "wide": (32, 256),
}


@pytest.fixture(params=KINDS)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile kind in place of the default."""
    use(request.param, monkeypatch)


def use(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KINDS[kind]
    if shape is not None:
        monkeypatch.setattr(
            groups,
            "group_tile",
            lambda _capability, _t, group: Tile("plain", *shape, min(group, groups.MAX_STEP), 4, num_stages=2),
        )


def operands(place: Place, T: int, N: int, K: int, group: int) -> dict[str, Any]:
    """Scales that differ between the groups of a row."""
    return {
        "x": Quantized(place.codes(T, K), place.randn(T, dtype=torch.float32).abs() / 50 + 0.01),
        "weight_q": place.codes(N, K),
        "weight_scale": (place.randn(N, K // group, dtype=torch.float32).abs() + 0.5) * K**-0.5 / 50,
        "bias": place.randn(N),
        "residual": place.randn(T, N),
    }


def exact_operands(place: Place, T: int, N: int, K: int, group: int) -> dict[str, Any]:
    """Operands whose every product, sum and scaling is exact in float32: small codes, powers of two as scales."""
    generator = torch.Generator().manual_seed(T + N + K + group)

    def whole(limit: int, *shape: int) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator).to(place.device)

    def power(*shape: int) -> Tensor:
        # Not by pow, which need not be exact on a GPU.
        return torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], device=place.device)[whole(2, *shape) + 2]

    return {
        "x": Quantized(whole(7, T, K).to(torch.int8), power(T)),
        "weight_q": whole(7, N, K).to(torch.int8),
        "weight_scale": power(N, K // group),
        "bias": whole(9, N).float(),
        "residual": whole(9, T, N).float(),
    }


def exact_terms(case: dict[str, Any]) -> list[Tensor]:
    """The summands of y in float64."""
    (codes, scale), weight_scale = case["x"], case["weight_scale"].double()
    weight = case["weight_q"].double() * weight_scale.repeat_interleave(codes.shape[1] // weight_scale.shape[1], dim=1)
    product = codes.double() @ weight.t() * scale.double().reshape(-1, 1)
    extras = (case[name] for name in ("bias", "residual"))
    return [product] + [extra.double().expand_as(product) for extra in extras if extra is not None]


def check(got: Tensor, case: dict[str, Any], dtype: torch.dtype) -> None:
    """As check_float, with the float32 error of each summand, which may cancel: the groups' sums among them."""
    terms = exact_terms(case)
    (codes, scale), weight_scale = case["x"], case["weight_scale"].double()
    weight = case["weight_q"].double().abs()
    weight *= weight_scale.repeat_interleave(codes.shape[1] // weight_scale.shape[1], dim=1)
    magnitude = codes.double().abs() @ weight.t() * scale.double().reshape(-1, 1)
    slack = (magnitude + sum(term.abs() for term in terms[1:])) * FLOAT32_SLACK / torch.finfo(dtype).eps * 2
    check_float(got, sum(terms[1:], terms[0]), dtype, rounded=slack)


def on_cpu(case: dict[str, Any]) -> dict[str, Any]:
    return {k: Quantized(*(t.cpu() for t in v)) if isinstance(v, Quantized) else v.cpu() for k, v in case.items()}


def test_linear(place: Place, tile: None) -> None:
    for T, N, K, group in place.shapes(SMALL, LARGE):
        case = operands(place, T, N, K, group)
        check(groups.int8_group_linear(**case, out_dtype=place.dtype), case, place.dtype)


def test_group_sums_are_the_exact_product(place: Place, tile: None) -> None:
    for T, N, K, group in SMALL:
        case = exact_operands(place, T, N, K, group)
        terms = exact_terms(case)
        got = groups.int8_group_linear(**case, out_dtype=torch.float32)
        assert torch.equal(got.double(), sum(terms[1:], terms[0]))
        assert torch.equal(got.cpu(), reference.int8_group_linear(**on_cpu(case), out_dtype=torch.float32))


def test_largest_sums_are_exact(place: Place, tile: None) -> None:
    """The codes that make the largest int32 sums of a step, with scales of one."""
    x = torch.full((17, 768), 127, dtype=torch.int8, device=place.device)
    weight = x[:1].expand(40, 768).contiguous()
    weight[::2] *= -1
    weight[:, 5] = place.codes(40, 1)[:, 0]
    for group in (32, 64, 128, 256):
        ones = torch.ones(40, 768 // group, device=place.device)
        one = torch.ones(1, device=place.device)
        got = groups.int8_group_linear(Quantized(x, one), weight, ones, out_dtype=torch.float32)
        assert torch.equal(got.double(), x.double() @ weight.double().t())


@given(
    st.integers(1, 140),
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from([32, 64, 128, 256, 512]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_reference_sums_are_the_exact_product(T: int, N: int, num_groups: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes, weight = (
        torch.randint(-7, 8, (rows, num_groups * group), generator=generator, dtype=torch.int8) for rows in (T, N)
    )
    x_scale, weight_scale = (2.0 ** torch.randint(-2, 3, s, generator=generator) for s in ((T,), (N, num_groups)))
    case: dict[str, Any] = {"x": Quantized(codes, x_scale), "weight_q": weight, "weight_scale": weight_scale}
    (want,) = exact_terms(case | {"bias": None, "residual": None})
    assert torch.equal(reference.int8_group_linear(**case, out_dtype=torch.float32).double(), want)


def test_every_epilogue(place: Place, tile: None) -> None:
    full = operands(place, 17, 300, 192, 64)
    one_scale = {"x": Quantized(full["x"].codes, full["x"].scale[:1])}
    for change in ({"bias": None}, {"residual": None}, {"bias": None, "residual": None}, one_scale):
        case = full | change
        check(groups.int8_group_linear(**case, out_dtype=place.dtype), case, place.dtype)


def test_reference_linear(place: Place) -> None:
    for T, N, K, group in [*SMALL, (130, 300, 192, 64)]:
        case = on_cpu(operands(place, T, N, K, group))
        check(reference.int8_group_linear(**case, out_dtype=place.dtype), case, place.dtype)


def test_a_row_has_the_same_bits_in_every_tile(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    case = operands(place, 65, 300, 512, 64)
    results = []
    for kind in KINDS:
        use(kind, monkeypatch)
        results.append(groups.int8_group_linear(**case, out_dtype=torch.float32))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_row_does_not_depend_on_its_batch(place: Place) -> None:
    case = operands(place, 130, 300, 256, 128)
    for op, given_case in ((groups.int8_group_linear, case), (reference.int8_group_linear, on_cpu(case))):
        batch = op(**given_case, out_dtype=place.dtype)
        for row in (slice(0, 1), slice(40, 57), slice(125, 130)):
            x = Quantized(*(part[row] for part in given_case["x"]))
            alone = given_case | {"x": x, "residual": given_case["residual"][row]}
            assert torch.equal(op(**alone, out_dtype=place.dtype), batch[row])


def test_operands_of_any_stride(place: Place) -> None:
    """Scales stored a group after the other, codes and residual cut from something wider."""
    case = operands(place, 17, 48, 256, 64)
    apart = case | {
        "x": Quantized(torch.cat([case["x"].codes] * 2, dim=1)[:, 256:], case["x"].scale),
        "weight_scale": case["weight_scale"].t().contiguous().t(),
        "residual": torch.cat([case["residual"]] * 2, dim=1)[:, 48:],
    }
    assert torch.equal(groups.int8_group_linear(**apart), groups.int8_group_linear(**case))
    assert torch.equal(reference.int8_group_linear(**on_cpu(apart)), reference.int8_group_linear(**on_cpu(case)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_shows_in_its_row(place: Place) -> None:
    case = operands(place, 3, 40, 64, 32)
    case["x"].scale[1] = float("inf")
    assert groups.int8_group_linear(**case).isfinite().any(-1).tolist() == [True, False, True]


def test_no_rows(place: Place) -> None:
    case = operands(place, 3, 40, 64, 32)
    none = case | {"x": Quantized(*(part[:0] for part in case["x"])), "residual": None}
    assert groups.int8_group_linear(**none).shape == (0, 40)


def test_reference_of_no_rows() -> None:
    case = operands(Place("cpu", torch.float32), 3, 40, 64, 32)
    none = case | {"x": Quantized(*(part[:0] for part in case["x"])), "residual": None}
    assert reference.int8_group_linear(**none).shape == (0, 40)


@pytest.mark.parametrize("shape", [(40, 5), (40, 16), (40, 0), (39, 2), (2, 40), (40,), (1,), (40, 1, 1)])
def test_scales_of_no_group_size_are_named(place: Place, shape: tuple[int, ...]) -> None:
    case = operands(place, 3, 40, 96, 32) | {"weight_scale": torch.ones(shape, device=place.device)}
    for op in (groups.int8_group_linear, reference.int8_group_linear):
        with pytest.raises(ValueError, match=rf"weight_scale .* a power of two from {MIN_GROUP}"):
            op(**case)


def test_bad_operands_are_named(place: Place) -> None:
    case = operands(place, 3, 40, 64, 32)
    wrong = {
        r"x.scale \(2,\)": {"x": Quantized(case["x"].codes, case["x"].scale[:2])},
        r"x.scale \(3, 1\)": {"x": Quantized(case["x"].codes, case["x"].scale[:, None])},
        r"bias \(39,\) must be \(40,\)": {"bias": case["bias"][1:]},
        r"residual \(2, 40\) must be \(3, 40\)": {"residual": case["residual"][1:]},
        r"\[N, 64\] and contiguous": {"weight_q": case["weight_q"].t().contiguous().t()},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            groups.int8_group_linear(**(case | change))


def test_twins_fail(place: Place) -> None:
    case = operands(place, 17, 300, 256, 64)
    got = groups.int8_group_linear(**case, out_dtype=place.dtype)
    scale = case["weight_scale"]
    for change in ({"weight_scale": scale.roll(1, 1)}, {"weight_scale": scale.roll(1, 0)}, {"bias": None}):
        with pytest.raises(AssertionError):
            check(got, case | change, place.dtype)


def test_default_tiles_stay_in_their_group() -> None:
    for capability in (80, 86, 89, 90, 100, 120):
        for t in (1, 16, 17, 64, 65, 4096):
            for group in (32, 64, 128, 256):
                tile = groups.group_tile(capability, t, group)
                assert group % tile.block_k == 0
                assert 2 <= tile.num_stages <= groups.MAX_STAGES
