"""The figures of records whose times are known: each expected number is worked out by hand."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidSettings
from service.tools.bench.measure import (
    Distribution,
    Phase,
    is_good,
    max_concurrent,
    mean_in_flight,
    read_slos,
    summarize,
    why_invalid,
    why_saturated,
)
from service.tools.bench.record import Counted, Record


def record(
    scheduled_s: float,
    sent_s: float,
    *token_s: float,
    tokens: int | None = None,
    prompt: int = 10,
    error: str | None = None,
) -> Record:
    return Record(
        scheduled_s,
        sent_s,
        prompt,
        len(token_s) if tokens is None else tokens,
        array("d", token_s),
        token_s[-1] if token_s else sent_s + 1.0,
        error,
        "why" if error else "",
        Counted.USAGE,
    )


TWO = Phase(
    [
        # TTFT 100 ms, gaps 50 and 150, E2E 300, TPOT 100; sent 10 ms late.
        record(1.00, 1.01, 1.11, 1.16, 1.31),
        # TTFT 300 ms, gaps 20, 20 and 60, E2E 400. Four events brought 6 tokens: TPOT 100 / 5. Sent 30 ms late.
        record(2.00, 2.03, 2.33, 2.35, 2.37, 2.43, tokens=6, prompt=20),
    ],
    started_s=0.93,
    ended_s=2.43,
)


def test_the_figures_of_two_answers() -> None:
    found = summarize([TWO])
    assert (found.sent, found.completed, found.input_tokens, found.output_tokens) == (2, 2, 30, 9)
    assert found.duration_s == pytest.approx(1.5)
    assert found.per_s(found.output_tokens) == pytest.approx(6.0)
    assert found.ttft is not None
    assert found.ttft.mean == pytest.approx(200)
    assert (found.ttft.std, found.ttft.p50, found.ttft.max) == pytest.approx((100, 200, 300))
    assert (found.ttft.p90, found.ttft.p99) == pytest.approx((280, 298))
    assert found.tpot is not None
    assert (found.tpot.mean, found.tpot.p50) == pytest.approx((60, 60))
    assert found.itl is not None
    # Pooled: 20 20 50 60 150.
    assert (found.itl.mean, found.itl.p50, found.itl.p90) == pytest.approx((60, 50, 114))
    assert found.e2el is not None
    assert found.e2el.mean == pytest.approx(350)
    assert found.scheduled_ttft is not None
    assert found.scheduled_ttft.mean == pytest.approx(220)
    assert found.scheduled_e2el is not None
    assert found.scheduled_e2el.mean == pytest.approx(370)
    assert found.lateness is not None
    assert (found.lateness.p50, found.lateness.max) == pytest.approx((20, 30))
    assert found.tokens_per_event == pytest.approx(9 / 7)
    # Second 0 of the phase has all of the first answer, second 1 all of the second.
    assert found.max_output_tokens_per_s == pytest.approx(6)


def test_failures_are_counted_by_kind_and_never_averaged_in() -> None:
    failed = [
        record(1.5, 1.5, 9.0, error="HTTP 500"),
        record(1.6, 1.6, error="cut off"),
        record(1.7, 1.7, error="cut off"),
    ]
    whole = summarize([Phase([*TWO.records, *failed], TWO.started_s, TWO.ended_s)], {"ttft": 1e9})
    clean = summarize([TWO], {"ttft": 1e9})
    assert (whole.sent, whole.completed, whole.errors) == (5, 2, {"cut off": 2, "HTTP 500": 1})
    for name in ("ttft", "tpot", "itl", "e2el", "scheduled_e2el", "output_tokens", "input_tokens", "good"):
        assert getattr(whole, name) == getattr(clean, name), name


def test_nothing_answered_has_no_figures() -> None:
    found = summarize([Phase([record(0.0, 0.0, error="timeout")], 0.0, 1.0)], {"ttft": 1.0})
    assert (found.completed, found.ttft, found.tpot, found.itl, found.e2el, found.good) == (
        0,
        None,
        None,
        None,
        None,
        0,
    )


def test_a_single_token_has_no_tpot_and_does_not_lower_the_mean() -> None:
    found = summarize([Phase([*TWO.records, record(2.0, 2.0, 2.1)], 0.93, 2.43)])
    assert found.tpot is not None
    assert found.tpot.mean == pytest.approx(60)
    assert is_good(record(0.0, 0.0, 0.1), {"tpot": 0.0, "itl": 0.0})


@pytest.mark.parametrize(
    ("words", "good"),
    [
        (["ttft:111"], 1),  # from the schedule: 110 and 330
        (["ttft:109"], 0),
        (["ttft:331", "e2el:431"], 2),
        (["ttft:331", "e2el:429"], 1),
        (["tpot:20.01"], 1),
        (["itl:60.01"], 1),  # the longest gap: 150 and 60
        (["itl:59"], 0),
        ([], None),
    ],
)
def test_goodput(words: list[str], good: int | None) -> None:
    assert summarize([TWO], read_slos(words)).good == good


@pytest.mark.parametrize("word", ["ttft", "ttft:", "ttft:x", "p99:3", "ttft:-1", "ttft:nan"])
def test_what_is_no_slo(word: str) -> None:
    with pytest.raises(InvalidSettings, match="NAME:MILLISECONDS"):
        read_slos([word])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_distribution_is_numpys(values: list[float]) -> None:
    found = Distribution.of(values)
    assert found is not None
    expected = (np.mean(values), np.std(values), *np.percentile(values, (50, 90, 99)), np.max(values))
    assert (found.mean, found.std, found.p50, found.p90, found.p99, found.max) == pytest.approx(expected, abs=1e-6)


def test_requests_in_flight() -> None:
    records = [record(0, 0.0, 2.0), record(0, 1.0, 3.0), record(0, 2.0, 4.0), record(0, 5.0, 6.0)]
    assert max_concurrent(records) == 2  # one ends just when the third begins
    assert max_concurrent([]) == 0


def steady(count: int, gap_s: float, takes_s: float) -> list[Record]:
    return [record(n * gap_s, n * gap_s, n * gap_s + takes_s) for n in range(count)]


def test_a_server_that_keeps_up_is_not_saturated() -> None:
    assert why_saturated([Phase(steady(40, 0.1, 0.35), 0.0, 4.3)]) is None


def test_a_growing_backlog_saturates() -> None:
    # One answer per 0.2 s, twice as slow as requests arrive.
    records = [record(n * 0.1, n * 0.1, 0.2 * (n + 1)) for n in range(40)]
    why = why_saturated([Phase(records, 0.0, 8.0)])
    # Half of what arrives in 1.95 s, half of the arrivals' time, is left over: about 9.75.
    assert why == "9.7 more requests in flight after half of the arrivals, of 20 that arrived meanwhile"


def test_the_requests_in_flight_are_averaged_over_time() -> None:
    records = [record(0, 0.0, 2.0), record(0, 1.0, 3.0), record(0, 2.5, 9.0)]
    # From 1 to 3: the first for 1 s, the second for 2, the third for a half.
    assert mean_in_flight(records, 1.0, 3.0) == pytest.approx(1.75)


def test_a_clump_at_the_end_is_no_growing_backlog() -> None:
    records = [*steady(40, 0.1, 0.35), *(record(3.9, 3.9, 4.25) for _ in range(5))]
    assert why_saturated([Phase(records, 0.0, 4.3)]) is None


def test_slos_and_failures_saturate() -> None:
    phase = Phase(steady(40, 0.1, 0.35), 0.0, 4.3)
    assert why_saturated([phase], {"ttft": 351}) is None
    assert why_saturated([phase], {"ttft": 349}) == "0 of 40 requests met the SLOs"
    failed = Phase([*phase.records, record(1.0, 1.0, error="HTTP 503")], 0.0, 4.3)
    assert why_saturated([failed]) == "1 of 41 requests failed"


def test_a_late_generator_makes_a_run_invalid() -> None:
    on_time = summarize([TWO])
    assert why_invalid(on_time, 30.0) is None
    assert why_invalid(on_time, 29.0) == "requests were sent late: p99 29.8 ms, above the limit of 29 ms"
    closed = summarize([Phase(TWO.records, 0.93, 2.43, lag_ms=[1.0, 12.0], is_open_loop=False)])
    assert closed.lateness is None
    assert why_invalid(closed, 20.0) is None
    assert "event loop woke late" in (why_invalid(closed, 10.0) or "")
