"""Where a kernel test runs, the poison in every tensor a wrapper allocates, and a cache folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import gemm
from tests.support.interpreter import patch_once_per_launch
from tests.support.places import PLACES, POISON, TILES, Place

if not torch.cuda.is_available():
    patch_once_per_launch()


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
            tensor: torch.Tensor = make(*args, **kwargs)
            return tensor.fill_(POISON.get(tensor.dtype, float("nan") if tensor.is_floating_point() else 0))

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of ~/.cache, where a user's tiles may be."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile kind in place of the table's choice."""
    chosen = TILES[request.param]
    if chosen is not None:
        monkeypatch.setattr(gemm, "choose", lambda *_: chosen)
