"""The simulated cluster against queueing theory and its own invariants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest

from benchmarks.simulation import Cluster, Limits, Load, Plant, Result, StepTimes, Work, simulate

FLAT = StepTimes(((1, 0.01), (64, 0.02)), ((0, 0.01), (1000, 0.05)))
ENGINE = Plant(1, FLAT, Limits(16, 512))
LOAD = Load(100, 10, 60.0, rate=20.0)


def test_a_lone_request_takes_its_steps() -> None:
    result = simulate(replace(ENGINE, limits=Limits(16, 64, plans_ahead=False)), Load(100, 3, 1.0, burst=1))
    read_s = FLAT.device_s(0, 64) + FLAT.device_s(0, 36)
    assert result.first == [pytest.approx(read_s)]
    assert result.whole == [pytest.approx(read_s + 2 * FLAT.device_s(1, 0))]


def test_a_table_is_followed_between_and_beyond_its_points() -> None:
    times = StepTimes(((1, 1.0), (3, 2.0), (5, 6.0)), ((0, 1.0), (10, 2.0)))
    assert [times.device_s(rows, 0) for rows in (1, 2, 3, 4, 7)] == pytest.approx([1.0, 1.5, 2.0, 4.0, 10.0])
    assert times.device_s(3, 5) == pytest.approx(1.5 + 1.0)


def test_a_launch_delays_a_prompt_and_not_a_decode() -> None:
    result = simulate(replace(ENGINE, times=replace(FLAT, launch_s=0.2)), Load(100, 3, 1.0, burst=1))
    assert result.first_s(50) == pytest.approx(0.2)
    assert result.whole_s(50) == pytest.approx(0.2 + 2 * FLAT.device_s(1, 0))


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_a_row_at_a_time_waits_as_md1(busy: float) -> None:
    """M/D/1: the mean wait is S * busy / (2 * (1 - busy)) for a service of S."""
    service_s = FLAT.device_s(0, 100)
    plant = replace(ENGINE, limits=Limits(1, 512, plans_ahead=False))
    result = simulate(plant, Load(100, 1, 300.0, rate=busy / service_s))
    assert fmean(result.first) - service_s == pytest.approx(service_s * busy / (2 * (1 - busy)), rel=0.1)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("cores", [None, 2])
def test_littles_law(replicas: int, cores: int | None) -> None:
    plant = replace(ENGINE, replicas=replicas, cores=cores, gateway=Work(1e-3, 1e-4), web=Work(1e-3, 1e-4))
    result = simulate(plant, replace(LOAD, rate=4.0, seconds=200.0, warm_s=5.0))
    assert result.in_flight == pytest.approx(result.sent / 195.0 * fmean(result.whole), rel=0.02)


def with_few_blocks(plant: Plant) -> Plant:
    return replace(plant, limits=Limits(16, 512, num_blocks=27, block_size=8))


def with_prefixes(plant: Plant) -> Plant:
    return replace(plant, replicas=3, limits=replace(plant.limits, cached_prefixes=2), affinity_bound=4)


@pytest.mark.parametrize("changed", [lambda plant: plant, with_few_blocks, with_prefixes])
def test_every_request_is_answered_once_and_leaves_nothing(changed: Callable[[Plant], Plant]) -> None:
    plant = changed(ENGINE)
    cluster = Cluster(plant, replace(LOAD, prefixes=5, prefix_tokens=64))
    result = cluster.run()
    assert result.answered == result.sent == len(result.whole) == len(result.first) > 1000
    assert sum(result.gaps.values()) == result.sent * (LOAD.output_tokens - 1)
    assert all(engine.is_idle and engine.num_free_blocks == plant.limits.num_blocks for engine in cluster.engines)
    assert (result.preemptions > 0) == (changed is with_few_blocks)
    assert (result.prefix_hits > 0) == (changed is with_prefixes)


def first_p99(result: Result) -> float:
    return result.first_s(99)


def gap_p99(result: Result) -> float:
    return result.gap_s(99)


@pytest.mark.parametrize("figure", [first_p99, gap_p99])
def test_more_load_is_never_faster(figure: Callable[[Result], float]) -> None:
    found = [figure(simulate(ENGINE, replace(LOAD, rate=rate))) for rate in (2.0, 10.0, 25.0, 60.0)]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_cores_are_shared_evenly() -> None:
    """Four replicas of which each would need a core: two cores do half of the work."""
    load = Load(100, 200, 20.0, clients=4, warm_s=5.0)
    own = replace(ENGINE, replicas=4, limits=replace(ENGINE.limits, plans_ahead=False))
    alone, shared = simulate(replace(own, cores=4), load), simulate(replace(own, cores=2), load)
    assert shared.tokens_per_s == pytest.approx(alone.tokens_per_s / 2, rel=0.02)
    assert alone.tokens_per_s == pytest.approx(simulate(own, load).tokens_per_s, rel=0.02)


def test_a_busy_gateway_is_what_all_wait_for() -> None:
    plant = replace(ENGINE, replicas=8, gateway=Work(0.0, 1e-3))
    result = simulate(plant, replace(LOAD, rate=200.0, seconds=10.0))
    assert result.tokens_per_s == pytest.approx(1000.0, rel=0.02)
    beside = simulate(replace(plant, gateways=4), replace(LOAD, rate=200.0, seconds=10.0))
    assert beside.first_s(99) < 0.1 * result.first_s(99)


def test_a_bound_spreads_a_popular_prefix() -> None:
    plant = replace(with_prefixes(ENGINE), replicas=4)
    load = replace(LOAD, prefixes=1, prefix_tokens=64, rate=60.0)
    spread = simulate(plant, load)
    held = simulate(replace(plant, affinity_bound=10**6), load)
    assert held.first_s(50) > spread.first_s(50)


def test_a_run_repeats() -> None:
    first, second = simulate(ENGINE, LOAD), simulate(ENGINE, LOAD)
    assert first == second
    assert simulate(ENGINE, replace(LOAD, seed=1)) != first
