"""Which rates a sweep tries."""

from __future__ import annotations

import pytest

from service.tools.bench.sweep import MAX_DOUBLINGS, Doubling, Listed, Sweep


def tried(sweep: Sweep, capacity: float) -> list[float]:
    found: dict[float, bool] = {}
    while (rate := sweep.next_rate(found)) is not None:
        found[rate] = rate > capacity
    return list(found)


def test_listed_rates_are_tried_in_their_order() -> None:
    assert tried(Listed([4.0, 1.0, 2.0]), 0.5) == [4.0, 1.0, 2.0]


def test_doubling_then_bisecting_in_geometric_means() -> None:
    assert tried(Doubling(1.0, 2), 6.0) == pytest.approx([1, 2, 4, 8, 32**0.5, (8 * 32**0.5) ** 0.5])
    assert tried(Doubling(1.0, 2), 4.5) == pytest.approx([1, 2, 4, 8, 32**0.5, (4 * 32**0.5) ** 0.5])
    assert tried(Doubling(1.0, 0), 6.0) == [1, 2, 4, 8]


def test_a_first_rate_that_saturates_is_the_last() -> None:
    assert tried(Doubling(3.0, 2), 1.0) == [3.0]


def test_a_server_that_never_saturates() -> None:
    assert tried(Doubling(1.0, 2), float("inf")) == [2.0**power for power in range(MAX_DOUBLINGS)]
