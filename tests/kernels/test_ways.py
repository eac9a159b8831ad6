"""The table of ways: what it says of which size, and what is no table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels import ways
from kernels.tiles import UNREADABLE

GPU = "NVIDIA Test 9"
FEW: ways.Way = "all_reduce_rms_norm"
MANY: ways.Way = "reduce_scatter_rms_norm"


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    ways._ways.cache_clear()
    yield
    ways._ways.cache_clear()


def written(content: object) -> Path:
    path = ways.user_ways(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_without_a_table_everything_is_plain(cache_home: Path) -> None:
    assert ways.user_ways(GPU) == cache_home / "ottava" / "ways" / "nvidia-test-9.json"
    assert ways.choose(GPU, 2, 4096, 1) == "plain"
    assert ways.most_rows(GPU, 2, 4096, "all_reduce_rms_norm", 8192) == 0


def test_a_way_holds_for_its_bucket_of_rows_its_ranks_and_its_width() -> None:
    written({"ways": {"2x4096": {"64": "all_reduce_rms_norm", "96": "plain", "2048": "reduce_scatter_rms_norm"}}})
    chosen = [ways.choose(GPU, 2, 4096, rows) for rows in (33, 64, 65, 96, 896, 897, 2048, 2049)]
    assert chosen == [FEW, FEW, "plain", "plain", "plain", MANY, MANY, "plain"]
    assert ways.choose(GPU, 4, 4096, 64) == ways.choose(GPU, 2, 8192, 64) == "plain"
    assert ways.most_rows(GPU, 2, 4096, FEW, 8192) == 64
    assert ways.most_rows(GPU, 2, 4096, MANY, 1000) == 1000


@pytest.mark.parametrize(
    "content",
    [[], {"ways": {"2x4096": {"64": "nvls"}}}, {"ways": {"2x4096": {"65": "plain"}}}, {"ways": {"4096": {}}}, {}],
)
def test_what_is_no_table_is_named_and_left_aside(content: object, caplog: pytest.LogCaptureFixture) -> None:
    path = written(content)
    assert ways.choose(GPU, 2, 4096, 64) == "plain"
    assert f"{path} is not a table of ways" in caplog.text
    with pytest.raises(UNREADABLE):
        ways.read_ways(path)


def test_the_package_s_tables_are_tables() -> None:
    """There is none until one was measured."""
    for path in ways.FOLDER.glob("*.json"):
        assert ways.read_ways(path)
