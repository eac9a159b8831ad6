"""Where a kernel test runs, and the poison in every tensor a wrapper allocates."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from kernels import gemm
from kernels.tiles import Tile

POISON = {torch.int8: -128, torch.int32: -(2**31) + 12345}


class Place(NamedTuple):
    """A device and the float dtype of the activations there."""

    device: str
    dtype: torch.dtype

    def shapes(self, small: list[tuple[int, ...]], large: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
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


def _name(place: Place) -> str:
    return f"{'interpreter' if place.device == 'cpu' else 'gpu'}-{str(place.dtype).removeprefix('torch.')}"


@pytest.fixture(params=PLACES, ids=_name)
def place(request: pytest.FixtureRequest) -> Place:
    """Each float dtype, under the interpreter on the CPU and on a GPU (marker `gpu`)."""
    chosen: Place = request.param
    if (chosen.device == "cuda") != torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU")
    return chosen


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty return what no op may leave behind: NaN, -128, and a large int32."""

    def poisoned(make: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(POISON.get(tensor.dtype, float("nan") if tensor.is_floating_point() else 0))

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


TILES = {
    "default": None,
    "plain": Tile("plain", 16, 32, 64, num_warps=4, num_stages=2, group=2),
    "swapped": Tile("swapped", 16, 64, 64, num_warps=4, num_stages=2),
    "split epilogue": Tile("plain", 32, 256, 64, num_warps=8, num_stages=2),
}


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile kind in place of the table's choice."""
    chosen = TILES[request.param]
    if chosen is not None:
        monkeypatch.setattr(gemm, "choose", lambda *_: chosen)
