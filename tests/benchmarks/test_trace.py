"""The arithmetic of a trace of the device."""

from __future__ import annotations

import pytest

from benchmarks.trace import Span, by_name, idle

SPANS = [
    Span("gemm", 100.0, 140.0),
    Span("copy", 110.0, 120.0),  # beside it, on another stream
    Span("attention", 141.0, 160.0),
    Span("gemm", 180.0, 200.0),
]


def test_time_without_any_span_is_idle() -> None:
    assert idle(SPANS) == pytest.approx(
        {
            "whole_ms": 0.1,
            "idle_share": 0.21,
            "between_steps_share": 0.20,
            "within_steps_share": 0.01,
            "longest_gap_us": 20.0,
        }
    )


def test_names_are_told_by_their_time() -> None:
    assert [row["name"] for row in by_name(SPANS)] == ["gemm", "attention", "copy"]
    assert by_name(SPANS)[0]["share"] == pytest.approx(60 / 89)
    assert by_name(SPANS)[0]["mean_us"] == 30.0
