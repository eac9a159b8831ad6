"""The tile table: buckets, a tuned file, and the way back to the defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels import tiles
from kernels.tiles import Gpu, Tile

TUNED = Tile("plain", 16, 32, 512, num_warps=2, num_stages=4)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU with one tuned entry: 4096 x 14336 for 17 to 32 tokens."""
    fields = {"kernel": "plain", "block_t": 16, "block_n": 32, "block_k": 512, "num_warps": 2, "num_stages": 4}
    table = {"gpu": "Test GPU (40GB)", "tiles": {"4096x14336": {"32": fields}}}
    (tmp_path / "test-gpu-40gb-.json").write_text(json.dumps(table))
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    return Gpu("Test GPU (40GB)", 90)


@pytest.mark.parametrize(
    ("t", "expected"),
    [(1, 16), (16, 16), (17, 32), (64, 64), (65, 96), (97, 128), (257, 384), (385, 512), (8192, 8192), (9999, 8192)],
)
def test_bucket(t: int, expected: int) -> None:
    assert tiles.bucket(t) == expected


def test_tuned_entry(gpu: Gpu) -> None:
    assert tiles.choose(gpu, 4096, 14336, 17) == tiles.choose(gpu, 4096, 14336, 32) == TUNED


def test_what_the_table_leaves_out_takes_the_default(gpu: Gpu) -> None:
    for n, k, t in ((4096, 14336, 33), (4096, 4096, 32), (28672, 4096, 32)):
        assert tiles.choose(gpu, n, k, t) == tiles.defaults(90, n, k, tiles.bucket(t))


def test_few_tokens_use_swapped_operands() -> None:
    hopper = Gpu("untuned", 90)
    assert tiles.choose(hopper, 28672, 4096, 1).kernel == "swapped"
    assert tiles.choose(hopper, 28672, 4096, 4096).kernel == "pingpong"
