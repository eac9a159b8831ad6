"""What the measurement of sums over GPUs makes of its results; the rest of it needs GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import collectives
from kernels import ways

GPU = "NVIDIA Test 9"


def row(rows: int, way: str, us: float | None, width: int = 4096) -> collectives.Row:
    found = {"ranks": 2, "width": width, "rows": rows, "way": way}
    return found | ({"wrong": "codes"} if us is None else {"us_p50": us})


def test_the_fastest_right_way_of_each_bucket_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = [
        row(64, "plain", 20.0),
        row(64, "all_reduce_rms_norm", 10.0),
        row(512, "plain", 40.0),
        row(512, "reduce_scatter_rms_norm", None),
        # Of a bucket that was not measured at its end.
        row(8, "plain", 1.0),
        row(64, "plain", 5.0, width=8192),
        # Another width was measured at that end.
        row(300, "plain", 5.0, width=8192),
    ]
    table = collectives.fastest(rows)
    assert table == {"2x4096": {"64": "all_reduce_rms_norm", "512": "plain"}, "2x8192": {"64": "plain"}}
    # All rows of a bucket count.
    few = [row(1, "plain", 15.5), row(16, "plain", 14.5), row(1, "all_reduce_rms_norm", 14.2)]
    assert collectives.fastest([*few, row(16, "all_reduce_rms_norm", 15.0)]) == {
        "2x4096": {"16": "all_reduce_rms_norm"}
    }
    # A way that was wrong for one of them is not taken, however fast it is for the others.
    assert collectives.fastest([*few, row(16, "all_reduce_rms_norm", None)]) == {"2x4096": {"16": "plain"}}
    path = collectives.write_ways(GPU, table)
    assert path == ways.user_ways(GPU)
    collectives.write_ways(GPU, {"2x4096": {"64": "plain"}})
    assert ways.read_ways(path) == {(2, 4096, 64): "plain", (2, 4096, 512): "plain", (2, 8192, 64): "plain"}


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are GPUs to measure on")
def test_without_gpus_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["collectives", "--ranks", "2"])
    with pytest.raises(SystemExit, match="--ranks 2 needs 2 GPUs or more, and"):
        collectives.main()
