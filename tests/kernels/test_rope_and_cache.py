"""Rotation and cache write against float64, in caches whose other slots must stay as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import rope
from tests.kernels.checks import check_float
from tests.kernels.conftest import Place

SENTINEL = 7.25
SHAPES = [(64, 64, 6, 2), (80, 80, 3, 3), (128, 32, 8, 1)]
LARGE = [(128, 128, 32, 8), (256, 256, 8, 1), (96, 96, 32, 32)]


def exact_rotation(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, heads, D] in float64 with its first R columns turned as complex numbers (low + i high) * (cos + i sin)."""
    x, half = x.double(), cos_sin.shape[-1] // 2
    turn = torch.complex(cos_sin[:, :half].double(), cos_sin[:, half:].double())[:, None]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


class Case:
    """One step: tokens with random positions and shuffled slots, the last but one a padding row."""

    def __init__(self, place: Place, T: int, D: int, R: int, H: int, G: int) -> None:
        self.H, self.G = H, G
        self.qkv = place.randn(T, (H + 2 * G) * D + 16)[:, 16:]
        angles = 100 * place.randn(50, R // 2, dtype=torch.float32)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        self.positions = torch.arange(T, dtype=torch.int32, device=place.device) * 7 % 50
        slots = torch.randperm(16 * (T // 16 + 2), generator=torch.Generator().manual_seed(T))[:T]
        slots[-2:-1] = -1
        self.slots = slots.to(place.device, torch.int32)
        self.k, self.v = (
            torch.full((T // 16 + 2, 16, G, D), SENTINEL, device=place.device, dtype=place.dtype) for _ in range(2)
        )

    def run(self) -> Tensor:
        return rope.rope_and_cache(self.qkv, self.positions, self.slots, self.cos_sin, self.k, self.v, self.H)

    def check(self, q: Tensor, positions: Tensor) -> None:
        G, D = self.k.shape[-2:]
        heads = self.qkv.unflatten(1, (self.H + 2 * G, D))
        turned = exact_rotation(heads[:, : self.H + G], self.cos_sin[positions.long()])
        check_float(q, turned[:, : self.H], self.qkv.dtype)
        keep = self.slots >= 0
        slots, used = self.slots[keep].long(), torch.zeros(self.k[:, :, 0, 0].numel(), dtype=torch.bool)
        used[slots.cpu()] = True
        check_float(self.k.flatten(0, 1)[slots], turned[keep, self.H :], self.k.dtype)
        assert torch.equal(self.v.flatten(0, 1)[slots], heads[keep, self.H + G :])
        for cache in (self.k, self.v):
            assert bool((cache.flatten(0, 1)[~used.to(cache.device)] == SENTINEL).all()), "an unused slot was written"


def test_rope_and_cache(place: Place) -> None:
    for D, R, H, G in place.shapes(SHAPES, LARGE):
        for T in place.shapes([1, 17, 63], [1000]) if D == 64 else [17]:
            case = Case(place, T, D, R, H, G)
            case.check(case.run(), case.positions)


def test_only_padding_rows(place: Place) -> None:
    case = Case(place, 3, 64, 64, 2, 1)
    case.slots.fill_(-1)
    case.check(case.run(), case.positions)


def test_bad_shapes_are_named(place: Place) -> None:
    case = Case(place, 3, 64, 64, 2, 1)
    case.H = 3
    with pytest.raises(ValueError, match="5 heads of 64 need 320"):
        case.run()
    case.H = 2
    case.k = case.k[:, :8]
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
    case.v[case.slots[0] // 16, case.slots[0] % 16] += 1
    with pytest.raises(AssertionError):
        case.check(q, case.positions)
    again = Case(place, 17, 64, 64, 6, 2)
    q = again.run()
    again.slots[:2] = again.slots[:2].flip(0)
    with pytest.raises(AssertionError):
        again.check(q, again.positions)
