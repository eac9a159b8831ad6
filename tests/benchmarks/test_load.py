"""The verdict of a soak, by samples whose faults are known."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from benchmarks.load.watch import Sample, judge, values

RUNS = 'ottava_requests_total{outcome="length",variant="w8a8"}'
RESTARTS = 'ottava_engine_restarts_total{variant="w8a8"}'
RUNNING = 'ottava_num_requests_running{variant="w8a8"}'
RESULT = {"completed": 9, "failed": 0, "p99_ttft_ms": 80.0, "ottava": {"valid": True}}


def samples() -> list[Sample]:
    """Five, an hour apart: memory grows by 1 % after the half."""
    return [
        {
            "time_s": 3600.0 * hour,
            "rss_mb": {"web": 120.0, "engine": 980.0},
            "anonymous_mb": {"web": 100.0 if hour < 3 else 101.0, "engine": 900.0},
            "files": {"web": 20, "engine": 30},
            "metrics": {RUNS: 10.0 * hour, RESTARTS: 0.0, RUNNING: 0.0 if hour == 4 else 2.0},
        }
        for hour in range(5)
    ]


def test_a_good_soak(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(samples(), [RESULT, {"points": [RESULT]}], 0.05) == 0
    said = capsys.readouterr().out
    assert "memory of web: 100 MB at half, 101 at the end (+1.0%), 101 at most" in said
    assert "requests: 18 answered, 0 failed, in 2 rounds" in said
    assert said.endswith("PASSED after 4.00 h and 5 samples\n")


@pytest.mark.parametrize(
    ("hour", "field", "name", "value", "said"),
    [
        (4, "anonymous_mb", "web", 106.0, "memory of web: 100 MB at half, 106 at the end (+6.0%)"),
        (4, "files", "engine", 100, "open files of engine: 30 at half, 100 at the end"),
        (3, "metrics", RUNS, 1.0, f"counters that went back: {RUNS}"),
        (4, "metrics", RESTARTS, 1.0, "engine restarts: 1"),
        (4, "metrics", 'ottava_requests_total{outcome="error",variant="w8a8"}', 1.0, "runs by outcome"),
        (4, "metrics", RUNNING, 1.0, "in use at the end"),
        (2, "metrics", None, {}, "/metrics answered 4 of 5 times"),
    ],
)
def test_what_fails_a_soak(
    hour: int, field: str, name: str | None, value: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = deepcopy(samples())
    if name is None:
        found[hour][field] = value
    else:
        found[hour][field][name] = value
    assert judge(found, [RESULT], 0.05) == 1
    (failed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL ")]
    assert said in failed


def test_failed_requests_and_no_rounds_fail_a_soak() -> None:
    assert judge(samples(), [RESULT | {"failed": 1}], 0.05) == 1
    assert judge(samples(), [], 0.05) == 1


def test_the_values_of_metrics() -> None:
    text = '# TYPE a counter\na_total{x="1"} 3\n# TYPE h histogram\nh_bucket{le="+Inf"} 2\nh_sum 1\nh_count 2\n'
    assert dict(values(text)) == {'a_total{x="1"}': 3.0, "h_sum{}": 1.0, "h_count{}": 2.0}
