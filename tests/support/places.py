"""Where a kernel test runs: the interpreter or a GPU, in a float type."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import pytest
import torch

from kernels.tiles import Tile

S = TypeVar("S", bound=int | tuple[int, ...])

POISON = {torch.int8: -128, torch.int32: -(2**31) + 12345}


class Place(NamedTuple):
    """A device and the float dtype of the activations there."""

    device: str
    dtype: torch.dtype

    def shapes(self, small: list[S], large: list[S]) -> list[S]:
        """The hostile small shapes everywhere; on a GPU those of real models too."""
        return small if self.device == "cpu" else small + large

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal values, seeded by the shape, the same on every device."""
        generator = torch.Generator().manual_seed(sum((i + 1) * size for i, size in enumerate(shape)))
        return torch.randn(shape, generator=generator).to(self.device, dtype or self.dtype)

    def codes(self, *shape: int) -> torch.Tensor:
        """int8 codes over the whole range, both ends included."""
        generator = torch.Generator().manual_seed(sum((i + 1) * size for i, size in enumerate(shape)))
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        codes[0], codes[-1, ::2] = 127, -127
        return codes.to(self.device)


# The interpreter rounds float32 to bfloat16 by cutting it off, so that type is left to the GPU.
PLACES = [Place("cpu", torch.float16), Place("cpu", torch.float32)] + [
    pytest.param(Place("cuda", dtype), marks=pytest.mark.gpu)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
]


TILES = {
    "default": None,
    "plain": Tile("plain", 16, 32, 64, num_warps=4, num_stages=2, group=2),
    "swapped": Tile("swapped", 16, 64, 64, num_warps=4, num_stages=2),
    "split epilogue": Tile("plain", 32, 256, 64, num_warps=8, num_stages=2),
}
