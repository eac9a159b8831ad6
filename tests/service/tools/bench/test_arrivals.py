"""Arrival times are drawn beforehand, at the rate they are named after."""

from __future__ import annotations

from itertools import pairwise
from math import inf
from random import Random
from statistics import fmean, pstdev

import pytest

from service.tools.bench.arrivals import Burst, Rate, arrival_times


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0, inf])
def test_the_last_of_count_requests_arrives_at_count_over_rate(burstiness: float) -> None:
    times = arrival_times(Rate(8.0, burstiness), 40, Random(3))
    assert len(times) == 40
    assert times == sorted(times)
    assert times[-1] == pytest.approx(5.0)


@pytest.mark.parametrize(("burstiness", "variation"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5), (inf, 0.0)])
def test_gaps_vary_as_a_gamma_distribution(burstiness: float, variation: float) -> None:
    """Its standard deviation over its mean is 1 / sqrt(shape); of 20,000 draws within 5 %."""
    times = arrival_times(Rate(100.0, burstiness), 20_000, Random(1))
    gaps = [after - before for before, after in pairwise(times)]
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(variation, rel=0.05, abs=1e-9)


def test_a_poisson_process_has_as_many_arrivals_in_a_second_as_variance() -> None:
    times = arrival_times(Rate(10.0), 20_000, Random(2))
    counts = [0] * 2001
    for time_s in times:
        counts[int(time_s)] += 1
    assert pstdev(counts[:-1]) ** 2 / fmean(counts[:-1]) == pytest.approx(1.0, abs=0.1)


def test_the_same_seed_draws_the_same_times_and_a_burst_has_none() -> None:
    assert arrival_times(Rate(3.0), 9, Random("a")) == arrival_times(Rate(3.0), 9, Random("a"))
    assert arrival_times(Rate(3.0), 9, Random("a")) != arrival_times(Rate(3.0), 9, Random("b"))
    assert arrival_times(Burst(), 3, Random(0)) == [0.0, 0.0, 0.0]
    assert arrival_times(Rate(3.0), 0, Random(0)) == []
