"""The tile tables: buckets, the user's file before the package's, and the way back to the defaults."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kernels import gemm, tiles, tune
from kernels.dequantize import MAX_TILE
from kernels.tiles import Target, Tile, prefill_tile
from kernels.tune import LinearShape, TileChoice

TUNED = Tile("plain", 16, 32, 512, num_warps=2, num_stages=4)
OTHER = Tile("swapped", 32, 64, 256, num_warps=4, num_stages=3)
FILE = "test-gpu-40gb-.json"


def table(*entries: tuple[str, str, Tile]) -> dict[str, Any]:
    found: dict[str, Any] = {"gpu": "Test GPU (40GB)", "capability": 90, "tiles": {}}
    for shape, bucket, tile in entries:
        found["tiles"].setdefault(shape, {})[bucket] = tile._asdict()
    return found


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """A GPU for which the package has one tuned entry: 4096 x 14336 for 17 to 32 tokens."""
    shipped = tmp_path / "package"
    shipped.mkdir()
    (shipped / FILE).write_text(json.dumps(table(("4096x14336", "32", TUNED))))
    monkeypatch.setattr(tiles, "FOLDER", shipped)
    _forget()
    yield Target("Test GPU (40GB)", 90)
    _forget()


def _forget() -> None:
    tiles._choose.cache_clear()
    tiles._tuned.cache_clear()


@pytest.fixture
def user(gpu: Target, cache_home: Path) -> Path:
    """The user's table of that GPU, in a folder that is there."""
    path = cache_home / "ottava" / "tiles" / FILE
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    ("t", "expected"),
    [(1, 16), (16, 16), (17, 32), (64, 64), (65, 96), (97, 128), (257, 384), (385, 512), (8192, 8192), (9999, 8192)],
)
def test_bucket(t: int, expected: int) -> None:
    assert tiles.bucket(t) == expected


def test_tuned_entry(gpu: Target) -> None:
    assert tiles.choose(gpu, 4096, 14336, 17) == tiles.choose(gpu, 4096, 14336, 32) == TUNED


def test_what_the_table_leaves_out_takes_the_default(gpu: Target) -> None:
    for n, k, t in ((4096, 14336, 33), (4096, 4096, 32), (28672, 4096, 32)):
        assert tiles.choose(gpu, n, k, t) == tiles.defaults(90, n, k, tiles.bucket(t))


def test_a_bucket_that_a_table_lacks_takes_the_next_tile_up_to_twice_as_large(gpu: Target, user: Path) -> None:
    """As in tables that were measured with fewer buckets."""
    user.write_text(json.dumps(table(("4096x4096", "1024", TUNED), ("4096x4096", "2048", OTHER))))
    for t, tile in ((513, TUNED), (1024, TUNED), (1025, OTHER), (2048, OTHER)):
        assert tiles.choose(gpu, 4096, 4096, t) == tile
    for t in (512, 2049):
        expected = TUNED if t == 512 else tiles.defaults(90, 4096, 4096, 4096)
        assert tiles.choose(gpu, 4096, 4096, t) == expected
    assert tiles.choose(gpu, 4096, 4096, 384) == tiles.defaults(90, 4096, 4096, 384)


def test_the_user_s_table_is_read_first(gpu: Target, user: Path) -> None:
    user.write_text(json.dumps(table(("4096x14336", "32", OTHER), ("4096x4096", "16", OTHER))))
    assert tiles.choose(gpu, 4096, 14336, 32) == tiles.choose(gpu, 4096, 4096, 1) == OTHER


def test_the_package_s_table_is_used_where_the_user_s_has_no_entry(gpu: Target, user: Path) -> None:
    user.write_text(json.dumps(table(("4096x4096", "16", OTHER))))
    assert tiles.choose(gpu, 4096, 14336, 32) == TUNED


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"tiles": {"4096x14336": {"32": {"ker',
        "[]",
        "{}",
        '{"tiles": []}',
        '{"tiles": {"4096": {}}}',
        '{"tiles": {"4096x4096": {"16": 3}}}',
        json.dumps(table(("4096x14336", "32", Tile("plain", 16, 33, 512, 2, 4)))),
        json.dumps(table(("4096x14336", "32", Tile("plain", 16, 32, 512, 2, 0)))),
        json.dumps(table(("4096x14336", "32", Tile("stream", 16, 16, 128, 4, 4)))),
        json.dumps(table(("4096x14336", "32", Tile("stream", 128, 32, 128, 4, 4)))),
        json.dumps(table(("4096x14336", "32", Tile("stream", 16, 64, 256, 4, 4)))),
        json.dumps(table(("4096x14336", "32", OTHER))).replace("swapped", "of tomorrow"),
        json.dumps(table(("4096x14336", "32", OTHER))).replace("num_stages", "num_steps"),
        "[" * 100_000,
        "\ud800",
    ],
)
def test_a_broken_file_is_told_once_and_the_package_s_table_used(
    gpu: Target, user: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    user.write_bytes(content.encode("utf-8", "surrogatepass"))
    with caplog.at_level(logging.WARNING):
        assert tiles.choose(gpu, 4096, 14336, 32) == TUNED
        assert tiles.choose(gpu, 4096, 4096, 32) == tiles.defaults(90, 4096, 4096, 32)
    (record,) = caplog.records
    assert f"{user} is not a table of tiles" in record.getMessage()


@pytest.mark.parametrize("variable", ["", None])
def test_without_xdg_the_cache_is_in_the_home_folder(
    variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if variable is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert tiles.user_table("NVIDIA H200") == tmp_path / ".cache" / "ottava" / "tiles" / "nvidia-h200.json"


@pytest.fixture
def measured(gpu: Target, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A GPU for `tune` on which OTHER always wins; what was measured on it."""
    done: list[tuple[int, int, int]] = []

    def best_tile(on: Target, shape: LinearShape, bucket: int) -> TileChoice:
        assert on == gpu
        done.append((shape.n, shape.k, bucket))
        return TileChoice(shape.n, shape.k, bucket, OTHER, 1.0, 2.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "current_gpu", lambda _: gpu)
    monkeypatch.setattr(tune, "best_tile", best_tile)
    return done


class OnCPU(TorchFunctionMode):
    """What asks for memory of a GPU gets that of the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("bucket", [16, 64])
def test_only_an_exact_tile_is_measured(is_gated: bool, bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tune, "ROTATION_BYTES", 1)
    launch = gemm.launch
    tile = Tile("plain", 16, 32, 32, num_warps=4, num_stages=1)
    with OnCPU():
        product = tune.Product(tune.LinearShape(96, 80, is_gated), bucket)
        assert product.is_exact(tile)
        assert product.is_exact(Tile("swapped", 16, 64, 32, num_warps=4, num_stages=1))

        def spoiled(x: Any, weight: Any, ops: Any, y: Any, tile: Any = None, gated: bool = False, **rest: Any) -> None:
            launch(x, weight, ops, y, tile, is_gated=rest.get("is_gated", gated))
            if rest.get("is_gated", gated) == is_gated:
                # Gated: y is right, and what is to be quantized by it is not.
                (ops.row_max if is_gated else y).view(-1)[-1] += 1

        monkeypatch.setattr(tune, "launch", spoiled)
        assert not product.is_exact(tile)


def test_tune_writes_where_choose_reads(gpu: Target, cache_home: Path, measured: list[tuple[int, int, int]]) -> None:
    progress: list[tuple[int, int]] = []
    choices = tune.tune([LinearShape(4096, 14336)], on_progress=lambda done, total: progress.append((done, total)))
    # The package has the bucket of 32.
    assert measured == [(4096, 14336, bucket) for bucket in tiles.BUCKETS if bucket != 32]
    assert [choice.bucket for choice in choices] == [bucket for _, _, bucket in measured]
    assert progress[-1] == (len(tiles.BUCKETS), len(tiles.BUCKETS))
    assert [path.name for path in (cache_home / "ottava" / "tiles").iterdir()] == [FILE]
    assert tiles.choose(gpu, 4096, 14336, 1) == OTHER
    assert tiles.choose(gpu, 4096, 14336, 32) == TUNED
    assert tune.tune([LinearShape(4096, 14336)]) == []


def test_tune_into_a_file_measures_what_the_file_lacks(
    gpu: Target, cache_home: Path, tmp_path: Path, measured: list[tuple[int, int, int]]
) -> None:
    path = tmp_path / "somewhere" / "mine.json"
    tune.tune([LinearShape(4096, 14336)], path)
    assert len(measured) == len(tiles.BUCKETS)
    assert tiles.read_table(path)["gpu"] == gpu.name
    assert list(cache_home.iterdir()) == []


def test_tune_begins_anew_where_the_file_is_broken(
    user: Path, measured: list[tuple[int, int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    user.write_text('{"tiles": {"4096x')
    tune.tune([LinearShape(4096, 4096)])
    assert len(measured) == len(tiles.BUCKETS)
    assert "is written anew" in caplog.text
    assert len(tiles.read_table(user)["tiles"]["4096x4096"]) == len(tiles.BUCKETS)


def test_an_interrupted_write_leaves_the_table_before(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table(("4096x4096", "16", OTHER))
    tiles.write_table(user, before)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tiles.write_table(user, table())
    assert [path.name for path in user.parent.iterdir()] == [FILE]
    assert tiles.read_table(user) == before


def test_few_tokens_have_kernels_of_their_own() -> None:
    hopper, ampere = Target("untuned", 90), Target("untuned", 80)
    for t in (1, 32, 33, 64):
        few = [tiles.choose(hopper, n, 4096, t) for n in (4096, 4112, 8192, 8208)]
        assert [tile.kernel for tile in few] == ["stream"] * 4
        assert [tile.block_n for tile in few] == [32 if t <= 32 else 64, 64, 64, 128]
        assert all(tile.block_t == tiles.bucket(t) for tile in few)
    assert tiles.choose(hopper, 28672, 4096, 4096).kernel == "pingpong"
    assert tiles.choose(ampere, 28672, 4096, 1).kernel == "swapped"
    assert tiles.choose(ampere, 4096, 4096, 1).kernel == "plain"


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("block_d", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_prompts_are_cut_into_as_many_keys_over_codes_as_over_floats(
    capability: int, block_d: int, element_bytes: int
) -> None:
    """Or a row over dequantized keys would have other bits."""
    gpu = Target("any", capability)
    codes, floats = (prefill_tile(gpu, block_d, element_bytes, size) for size in (1, element_bytes))
    assert codes.block_n == floats.block_n <= MAX_TILE
