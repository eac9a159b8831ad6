"""Leases that a gateway keeps for the next request."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from service.cluster.kept import FULL_S, IDLE_IN_GATEWAY_S, KeptLeases
from service.cluster.leases import IDLE_IN_REPLICA_S


@dataclass(eq=False)
class Lease:
    replica: str


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(clock: Clock) -> KeptLeases[Lease]:
    return KeptLeases(clock)


def test_a_lease_is_used_again_by_one_request_at_a_time(leases: KeptLeases[Lease]) -> None:
    lease = leases.use(Lease("a"))
    assert leases.take("a") is None, "it is in use"
    assert leases.done(lease, is_whole=True)
    assert leases.take("b") is None, "it is another replica's"
    assert leases.take("a") is lease
    assert leases.take("a") is None


def test_a_lease_whose_answer_was_cut_off_is_not_used_again(leases: KeptLeases[Lease]) -> None:
    assert not leases.done(leases.use(Lease("a")), is_whole=False)
    assert leases.take("a") is None
    assert leases.loads.get("a", 0) == 0


def test_loads_are_leases_in_use(leases: KeptLeases[Lease]) -> None:
    first, _ = leases.use(Lease("a")), leases.use(Lease("a"))
    assert dict(leases.loads) == {"a": 2}
    leases.done(first, is_whole=True)
    assert dict(leases.loads) == {"a": 1}
    leases.take("a")
    assert dict(leases.loads) == {"a": 2}


def test_a_lease_is_not_kept_for_as_long_as_its_replica_keeps_it(leases: KeptLeases[Lease], clock: Clock) -> None:
    assert IDLE_IN_GATEWAY_S < IDLE_IN_REPLICA_S
    old, new = leases.use(Lease("a")), leases.use(Lease("a"))
    leases.done(old, is_whole=True)
    clock.now_s += 0.8 * IDLE_IN_GATEWAY_S
    leases.done(new, is_whole=True)
    clock.now_s += 0.8 * IDLE_IN_GATEWAY_S
    assert leases.take("a") is new
    assert leases.take("a") is None


def test_where_requests_wait_for_a_place_none_is_kept_and_no_newcomer_takes_one(
    leases: KeptLeases[Lease], clock: Clock
) -> None:
    kept, used = leases.use(Lease("a")), leases.use(Lease("a"))
    leases.done(kept, is_whole=True)
    found = []
    with leases.asking():
        # Ray takes some time for each.
        found.append(leases.is_full)
        clock.now_s += FULL_S
        with leases.asking():
            found.append(leases.is_full)
            assert leases.take("a") is None
            assert not leases.done(used, is_whole=True)
    assert [*found, leases.is_full] == [False, True, False]
    assert leases.take("a") is kept


@pytest.mark.parametrize("ended_first", [False, True])
def test_what_a_replica_has_ended_is_forgotten(leases: KeptLeases[Lease], ended_first: bool) -> None:
    kept, used = leases.use(Lease("a")), leases.use(Lease("a"))
    leases.done(kept, is_whole=True)
    leases.ended(kept)
    assert leases.take("a") is None
    assert dict(leases.loads) == {"a": 1}
    if ended_first:
        leases.ended(used)
    leases.done(used, is_whole=False)
    leases.ended(used)
    assert not leases.loads
    assert not leases.num_idle
