"""The picture of loads: which rows are points of it, and that it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.traffic_plot import by_rate, draw


def row(point: str, **values: Any) -> dict[str, Any]:
    times = {"median_ttft_ms": 20.0, "p99_ttft_ms": 40.0, "median_tpot_ms": 4.0}
    return {"server": "ottava", "point": point} | times | values


ROWS = [
    row("latency"),
    row("rate:28:12"),
    row("rate:4:12"),
    row("burst:256"),
    row("saturation:2:8:5", rate=8.0, is_served=False),
]


def test_rates_and_saturations_are_points_in_order() -> None:
    assert [(each["rate"], each["is_served"]) for each in by_rate(ROWS)] == [(4, True), (8, False), (28, True)]


def test_it_is_drawn(tmp_path: Path) -> None:
    draw(
        [{"run": {"device": "a GPU", "command": "python -m benchmarks.traffic --float"}, "rows": ROWS}],
        tmp_path / "a.png",
    )
    assert (tmp_path / "a.png").stat().st_size > 10_000
