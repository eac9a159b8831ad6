"""Rotation and cache write against float64, in caches whose other slots must stay as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference, rope
from kernels.quantized import Quantized
from kernels.reference.attention import as_multiplied
from tests.support.kernel_checks import check_codes, check_float, codes_of, floats_of
from tests.support.places import Place

SENTINEL = 7.25
CODE = -99
SHAPES = [(64, 64, 6, 2), (80, 80, 3, 3), (128, 32, 8, 1), (64, 0, 3, 3)]
EPS = 1e-5
LARGE = [(128, 128, 32, 8), (256, 256, 8, 1), (96, 96, 32, 32)]


def exact_rotation(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, heads, D] in float64 with its first R columns turned as complex numbers (low + i high) * (cos + i sin)."""
    x, half = x.double(), cos_sin.shape[-1] // 2
    turn = torch.complex(cos_sin[:, :half].double(), cos_sin[:, half:].double())[:, None]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


class Case:
    """One step: tokens with random positions and shuffled slots, the last but one a padding row."""

    def __init__(
        self, place: Place, T: int, D: int, R: int, H: int, G: int, is_int8: bool = False, is_normed: bool = False
    ) -> None:
        self.H, self.G = H, G
        self.qkv = place.randn(T, (H + 2 * G) * D + 16)[:, 16:]
        angles = 100 * place.randn(50, R // 2, dtype=torch.float32)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        self.sink: Tensor | None = None
        self.weights: tuple[Tensor, ...] = (1 + place.randn(D), 3 + place.randn(D + 1)[1:]) if is_normed else ()
        self.positions = torch.arange(T, dtype=torch.int32, device=place.device) * 7 % 50
        slots = torch.randperm(16 * (T // 16 + 2), generator=torch.Generator().manual_seed(T))[:T]
        slots[-2:-1] = -1
        self.slots = slots.to(place.device, torch.int32)
        shape = (T // 16 + 2, 16, G, D)
        self.k: Tensor | Quantized
        self.v: Tensor | Quantized
        self.k, self.v = (torch.full(shape, SENTINEL, device=place.device, dtype=place.dtype) for _ in range(2))
        if is_int8:
            self.k, v = (
                Quantized(
                    torch.full(shape, CODE, dtype=torch.int8, device=place.device),
                    torch.full(shape[:3], SENTINEL, device=place.device),
                )
                for _ in range(2)
            )
            # The slots of a block side by side, for v alone.
            self.v = Quantized(v.codes, v.scale.transpose(1, 2).contiguous().transpose(1, 2))

    def run(self) -> Tensor:
        where = self.positions, self.slots, self.cos_sin, self.k, self.v
        q_weight, k_weight = (*self.weights, None, None)[:2]
        return rope.rope_and_cache(self.qkv, *where, self.H, q_weight, k_weight, EPS, self.sink)

    def put_at_sink(self) -> None:
        """Four tokens at its first three positions."""
        at, positions = torch.tensor([[0, 5, 9, 12], [0, 1, 0, 2]], dtype=torch.int32, device=self.qkv.device)
        self.positions[at.long()] = positions

    def check_with_sink(self, sink: Tensor, given: Tensor | None = None) -> None:
        """Run with a sink, or with another one that is given, and check as if its rows were in qkv."""
        exact = self.qkv.clone()
        for position, row in enumerate(sink):
            exact[self.positions == position] = row
            self.qkv[self.positions == position] = 1000.0
        self.sink = sink if given is None else given
        q, self.qkv = self.run(), exact
        if isinstance(self.k, Quantized):
            self.check_int8(q)
        else:
            self.check(q, self.positions)

    def turned(self, positions: Tensor) -> Tensor:
        """Queries and keys in float64 as they should leave the op."""
        heads = torch.unflatten(self.qkv, 1, (self.H + 2 * self.G, -1))[:, : self.H + self.G]
        if self.weights:
            each = zip(torch.split(heads, [self.H, self.G], dim=1), self.weights, strict=True)
            heads = torch.cat([exact_norm(part, weight) for part, weight in each], dim=1)
        return exact_rotation(heads, self.cos_sin[positions.long()])

    def check_int8(self, q: Tensor) -> None:
        caches = codes_of(self.k), codes_of(self.v)
        G, D = caches[0].codes.shape[-2:]
        heads = torch.unflatten(self.qkv, 1, (self.H + 2 * G, D))
        turned = self.turned(self.positions)
        self.check_rounded(q, turned[:, : self.H])
        keep = self.slots >= 0
        at = self.slots[keep].long() // 16, self.slots[keep].long() % 16
        k, v = (Quantized(cache.codes[at].flatten(0, 1), cache.scale[at].flatten()) for cache in caches)
        check_codes(k, turned[keep, self.H :].flatten(0, 1))
        # On the CPU: on a GPU torch divides by 127 as a multiplication, an ulp off.
        want = reference.quantize_rows(heads[keep, self.H + G :].flatten(0, 1).cpu())
        assert all(torch.equal(a.cpu(), b) for a, b in zip(v, want, strict=True))
        for cache in caches:
            for part, sentinel in ((cache.codes, CODE), (cache.scale, SENTINEL)):
                rest = part.clone()
                rest[at] = sentinel
                assert bool((rest == sentinel).all()), "an unused slot was written"

    def check_rounded(self, q: Tensor, turned: Tensor) -> None:
        """Within half a code and what the dtype rounds of the exact heads, and what its own codes stand for."""
        assert q.dtype == self.qkv.dtype
        half_ulp = torch.finfo(q.dtype).eps / 2
        # The head is rounded to the dtype, to codes, and what they stand for to the dtype.
        bound = (0.5 / 127 + 2.1 * half_ulp + 2.0**-18) * turned.abs().amax(-1, keepdim=True)
        assert bool(((q.double() - turned).abs() <= bound).all())
        # On the CPU: on a GPU torch divides by 127 as a multiplication, an ulp off.
        rounded = reference.quantize_rows(q.flatten(0, 1).cpu())
        stand_for = (rounded.codes * rounded.scale[:, None]).to(q.dtype)
        assert torch.equal(q.flatten(0, 1).cpu(), stand_for)

    def check(self, q: Tensor, positions: Tensor) -> None:
        caches = floats_of(self.k), floats_of(self.v)
        G, D = caches[0].shape[-2:]
        heads = torch.unflatten(self.qkv, 1, (self.H + 2 * G, D))
        turned = self.turned(positions)
        check_float(q, turned[:, : self.H], self.qkv.dtype)
        keep = self.slots >= 0
        slots, used = self.slots[keep].long(), torch.zeros(caches[0][:, :, 0, 0].numel(), dtype=torch.bool)
        used[slots.cpu()] = True
        check_float(caches[0].flatten(0, 1)[slots], turned[keep, self.H :], caches[0].dtype)
        assert torch.equal(caches[1].flatten(0, 1)[slots], heads[keep, self.H + G :])
        for cache in caches:
            assert bool((cache.flatten(0, 1)[~used.to(cache.device)] == SENTINEL).all()), "an unused slot was written"


def test_rope_and_cache(place: Place) -> None:
    for D, R, H, G in place.shapes(SHAPES, LARGE):
        for T in place.shapes([1, 17, 63], [1000]) if D == 64 else [17]:
            case = Case(place, T, D, R, H, G)
            case.check(case.run(), case.positions)


def test_head_norms(place: Place) -> None:
    """Of queries and keys, with a head of zeros and partners from beyond the turned columns; values stay."""
    for D, R, H, G in place.shapes([*SHAPES, (96, 64, 3, 1)], LARGE):
        case = Case(place, 17, D, R, H, G, is_normed=True)
        torch.unflatten(case.qkv, 1, (-1, D))[3, 0] = 0.0
        case.check(case.run(), case.positions)
    case = Case(place, 17, 64, 32, 6, 2, is_int8=True, is_normed=True)
    case.check_int8(case.run())


def test_head_norm_twins_fail(place: Place) -> None:
    corruptions: list[Callable[[Case], tuple[Tensor, ...]]] = [
        lambda case: case.weights[::-1],
        lambda case: (case.weights[0].roll(1), case.weights[1]),
        lambda case: (case.weights[0], 1.01 * case.weights[1]),
        lambda _: (),
    ]
    for corrupt in corruptions:
        case = Case(place, 17, 64, 64, 6, 2, is_normed=True)
        exact = case.weights
        case.weights = corrupt(case)
        q = case.run()
        case.weights = exact
        with pytest.raises(AssertionError):
            case.check(q, case.positions)


def test_rows_of_a_sink_stand_in_for_those_of_its_positions(place: Place) -> None:
    """At positions 0 and 1, which three of the tokens have; what qkv holds there is not read."""
    for num_sinks, is_int8, is_normed in ((1, False, False), (2, False, True), (2, True, False), (3, True, True)):
        case = Case(place, 17, 64, 32, 6, 2, is_int8=is_int8, is_normed=is_normed)
        case.put_at_sink()
        assert int((case.positions < 2).sum()) == 3
        case.check_with_sink(place.randn(num_sinks, case.qkv.shape[1]))


def test_sink_twins_fail(place: Place) -> None:
    sink = place.randn(3, 640)
    for wrong in (sink[:1], sink.roll(1, 0), sink.roll(64, 1), 1.02 * sink):
        case = Case(place, 17, 64, 32, 6, 2)
        case.put_at_sink()
        with pytest.raises(AssertionError):
            case.check_with_sink(sink[:2], wrong.contiguous())


def test_a_sink_that_does_not_fit_is_named(place: Place) -> None:
    case = Case(place, 3, 64, 64, 2, 1)
    for sink in (place.randn(1, 192), place.randn(1, 256, dtype=torch.float64), place.randn(2, 512)[:, ::2]):
        case.sink = sink
        with pytest.raises(ValueError, match="contiguous rows like those of qkv, 256 columns"):
            case.run()


def test_only_padding_rows(place: Place) -> None:
    case = Case(place, 3, 64, 64, 2, 1)
    case.slots.fill_(-1)
    case.check(case.run(), case.positions)


def test_int8_cache(place: Place) -> None:
    for D, R, H, G in place.shapes([*SHAPES, (96, 64, 3, 1)], LARGE):
        case = Case(place, 17, D, R, H, G, is_int8=True)
        # A head of zeros has scale 1; a token's faulty head must not touch its neighbours.
        torch.unflatten(case.qkv, 1, (-1, D))[3, -1] = 0.0
        case.check_int8(case.run())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_int8_faults(place: Place) -> None:
    case = Case(place, 3, 64, 64, 2, 2, is_int8=True)
    torch.unflatten(case.qkv, 1, (-1, 64))[0, 2:] = float("nan")
    case.run()
    at = case.slots[0] // 16, case.slots[0] % 16
    assert not codes_of(case.k).scale[at].isfinite().any()
    assert not codes_of(case.v).scale[at].isfinite().any()


def test_bad_shapes_are_named(place: Place) -> None:
    case = Case(place, 3, 64, 64, 2, 1)
    case.H = 3
    with pytest.raises(ValueError, match="5 heads of 64 need 320"):
        case.run()
    case.weights = (place.randn(64),)
    with pytest.raises(ValueError, match="normed both or neither"):
        case.run()
    case.weights = ()
    case.H = 2
    case.k = floats_of(case.k).repeat_interleave(2, dim=3)[..., ::2]
    with pytest.raises(ValueError, match="cannot have strides"):
        case.run()


def test_twins_fail(place: Place) -> None:
    case = Case(place, 17, 64, 64, 6, 2)
    q = case.run()
    case.check(q, case.positions)
    with pytest.raises(AssertionError):
        case.check(q, (case.positions + 1) % 50)
    with pytest.raises(AssertionError):
        case.check(q.roll(1, 1), case.positions)
    floats_of(case.v)[case.slots[0] // 16, case.slots[0] % 16] += 1
    with pytest.raises(AssertionError):
        case.check(q, case.positions)
    again = Case(place, 17, 64, 64, 6, 2)
    q = again.run()
    again.slots[:2] = again.slots[:2].flip(0)
    with pytest.raises(AssertionError):
        again.check(q, again.positions)


def test_int8_twins_fail(place: Place) -> None:
    for name, part in (("k", "codes"), ("k", "scale"), ("v", "codes"), ("v", "scale")):
        case = Case(place, 17, 64, 64, 6, 2, is_int8=True)
        q = case.run()
        case.check_int8(q)
        tensor = getattr(getattr(case, name), part)
        tensor[case.slots[0] // 16, case.slots[0] % 16, 1] += 1
        with pytest.raises(AssertionError):
            case.check_int8(q)
    case.slots[0] = -1
    with pytest.raises(AssertionError):
        case.check_int8(q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-24, 12))
def test_codes_of_rounded_queries_are_the_same(dtype: torch.dtype, seed: int, exponent: int) -> None:
    """So a decode has the same bits whether its query was rounded before or not. Very small heads are subnormal."""
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(16, 3, 64, generator=generator) * 2.0**exponent).to(dtype)
    keys = Quantized(torch.zeros(1, 16, 3, 64, dtype=torch.int8), torch.ones(1, 16, 3))
    rounded = as_multiplied(q, keys).to(dtype)
    before, after = (reference.quantize_rows(x.flatten(0, 1)) for x in (q, rounded))
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.scale, after.scale)
