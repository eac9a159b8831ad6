"""The simulation of targets: what any engine must do, and that a longer target reads prompts sooner."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.targets import Device, Seen, arrivals, on_a_line, row_of, rows_of, simulated, table
from service.engine.request import Request
from service.engine.scheduler import Chunk, Step
from service.engine.shapes import Shape
from tests.support.requests import new_request

TIMES_S = on_a_line(5.0, 50.0)


def args(**changes: object) -> argparse.Namespace:
    usual = {"input_len": 300, "output_len": 12, "seconds": 3.0, "ahead_ms": 1.0, "key_ns": 0.0}
    return argparse.Namespace(**usual | {"loads": ["20"], "targets": []} | changes)


def test_a_lone_request_takes_its_steps() -> None:
    (seen,) = simulated(Device(TIMES_S, 0.0), 0.025, [1.0], args())
    # 300 rows are padded to 320, one row to itself.
    assert seen.first_s == pytest.approx(0.005 + 319 * 50e-6)
    assert seen.token_s == pytest.approx(0.005)
    assert len(seen.times_s) == 12


def test_keys_take_time() -> None:
    (seen,) = simulated(Device(TIMES_S, 1e-6), 0.025, [0.0], args())
    gaps = [after - before for before, after in zip(seen.times_s, seen.times_s[1:], strict=False)]
    assert gaps == pytest.approx([0.005 + 1e-6 * (300 + n) for n in range(11)])


def test_a_step_takes_the_smallest_shape_that_holds_it() -> None:
    def step_of(*lengths: int) -> Step:
        requests: list[Request] = [new_request(str(n), 999) for n in range(len(lengths))]
        return Step([Chunk(r, 5, n, n == 1, 0) for r, n in zip(requests, lengths, strict=True)])

    device = Device(TIMES_S, 0.0)
    assert device.run(step_of(1, 1, 1))[0] == Shape(4, 4, is_decode=True)
    assert device.run(step_of(1, 1, 99))[0] == Shape(128, 16)
    assert device.run(step_of(*[1] * 16, 99))[0] == Shape(128, 64)


def test_a_longer_target_trades_gaps_for_first_tokens() -> None:
    rows = list(rows_of(TIMES_S, args(targets=[10.0, 40.0])))
    short, long = rows
    assert [row["target_itl_ms"] for row in rows] == pytest.approx([10.0, 40.0])
    assert short["between_tokens_ms"][1] <= 10.0 < long["between_tokens_ms"][1] <= 40.0
    assert short["first_token_ms"][1] > 1.5 * long["first_token_ms"][1]
    assert len(table(rows).splitlines()) == 3


def test_without_a_target_it_is_the_models_own() -> None:
    (row,) = rows_of(on_a_line(10.0, 50.0), args())
    assert row["target_itl_ms"] == pytest.approx(40.0)


def test_loads() -> None:
    assert arrivals("burst:3", 9.0) == [0.0, 0.0, 0.0]
    times = arrivals("50", 4.0)
    assert times == sorted(times)
    assert 150 < len(times) < 250
    assert times[-1] < 4.0


@pytest.mark.parametrize("load", ["brust:3", "0.01"])
def test_what_is_no_load_is_refused(load: str) -> None:
    with pytest.raises(ValueError, match=r"no load|nobody comes"):
        arrivals(load, 1.0)


def test_good_requests_are_counted() -> None:
    good, late, slow = Seen(1.0, [1.2, 1.219]), Seen(1.0, [1.21, 1.22]), Seen(1.0, [1.1, 1.13])
    row = row_of("1", 0.025, [good, late, slow])
    assert row["good_share"] == pytest.approx(1 / 3)
    assert row["output_tokens_per_s"] == pytest.approx(6 / 1.22)
    assert row["first_token_ms"] == pytest.approx([200.0, 210.0], rel=2e-3)
