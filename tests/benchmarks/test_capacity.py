"""The plan's inputs, its arithmetic, and that the manual has the figures of the result file."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.capacity import (
    GPU,
    VARIANTS,
    Slo,
    arguments,
    fewest,
    gateways_for,
    gpu_plant,
    most,
    num_blocks,
    read,
    step_times,
)
from benchmarks.simulation import Limits, Load, Plant, Result, simulate
from tests.support.pages import ROOT, text_of

ROWS: list[dict[str, Any]] = read("capacity")["rows"]
SLO = Slo(500, 100)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_that_were_measured(variant: str) -> None:
    times = step_times(GPU, variant)
    for row in (row for row in read(GPU)["rows"] if row["variant"] == variant):
        if row["what"] == "decode":
            assert times.device_s(row["batch"], 0) == pytest.approx(row["itl_ms_p50"] / 1e3)
        if row["what"] == "prefill":
            assert times.device_s(0, 8192) == pytest.approx(8192 / row["tokens_per_s"])
    assert times.device_s(0, 1) == times.device_s(1, 0) < times.device_s(0, 512)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_burst_takes_what_it_took_on_the_gpu(variant: str) -> None:
    """No figure of the burst goes into the tables."""
    (row,) = [row for row in read(GPU)["rows"] if (row["what"], row["variant"]) == ("burst", variant)]
    load = Load(row["prompt"], row["max_tokens"], 1e9, burst=row["batch"])
    result = simulate(Plant(1, step_times(GPU, variant), Limits(256, 8192)), load)
    assert row["batch"] * row["max_tokens"] / result.end_s == pytest.approx(row["tokens_per_s"], rel=0.03)


def test_an_slo() -> None:
    met = Result(sent=2, answered=2, first=[0.1, 0.4])
    assert SLO.holds(met)
    assert not SLO.holds(Result(sent=2, answered=1, first=[0.1]))
    assert not SLO.holds(Result(sent=1, answered=1, first=[0.6]))
    met.gaps[round(0.2 / 1e-5)] = 1
    assert not SLO.holds(met)
    assert Slo.read("500:100") == SLO


def test_the_fewest_keep_the_slo_and_one_less_does_not() -> None:
    """120 requests/s are more than one GPU does at once, whatever the SLO says of a moment."""
    args = arguments(["--seconds", "1"])
    assert fewest("w8a8", "replayed", SLO, 120.0, 120.0, args)["gpus"] == 2
    assert most("w8a8", "as measured", Slo(50, 10), arguments(["--seconds", "1"])) == 0


def test_gateways_are_as_busy_as_they_may_be() -> None:
    assert gateways_for(1.0, 0.5) == 1
    assert 1.9 < gateways_for(2000.0, 0.5) / gateways_for(1000.0, 0.5) < 2.1
    assert gateways_for(1000.0, 0.25) > gateways_for(1000.0, 0.5)


def test_smaller_weights_leave_more_blocks() -> None:
    assert num_blocks("w8a8") > num_blocks("fp16")
    assert gpu_plant("w8a8", 2).times.launch_s > 0 == gpu_plant("w8a8", 2, "replayed").times.launch_s


def test_the_manual_has_the_figures_of_the_result() -> None:
    page = text_of(ROOT / "docs" / "scaling.md")
    rows = [row for row in ROWS if row["part"] == "gpus" and row["rate"] is not None]
    assert len(rows) == 16
    for rate in (10, 100, 1000, 10_000):
        found = [row["gpus"] for row in rows if row["rate"] == rate]
        gateways = next(row["gateways"] for row in rows if row["rate"] == rate)
        assert "| " + " | ".join([f"{rate:,}", *map(str, found), str(gateways)]) + " |\n" in page


def test_no_check_is_further_off_than_the_manual_says() -> None:
    held = [row for row in ROWS if row["part"] == "check" and row["is_held"]]
    assert {row["load"].partition(",")[0] for row in held} >= {"H100", "1 replicas on two cores"}
    assert all(0.8 < row["ratio"] < 1.25 for row in held if row["load"].startswith("H100"))
    assert all(0.5 < row["ratio"] < 1.5 for row in held)
