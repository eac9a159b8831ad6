"""Leases that a gateway keeps for the next request."""

from __future__ import annotations

from dataclasses import dataclass

from service.cluster.kept import KEPT_S, KeptLeases


@dataclass(eq=False)
class Lease:
    replica: str


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_lease_is_used_again_by_one_request_at_a_time() -> None:
    leases: KeptLeases[Lease] = KeptLeases(Clock())
    lease = leases.use(Lease("a"))
    assert leases.take("a") is None, "it is in use"
    leases.done(lease, is_whole=True)
    assert leases.take("b") is None, "it is another replica's"
    assert leases.take("a") is lease
    assert leases.take("a") is None


def test_a_lease_whose_answer_was_cut_off_is_not_used_again() -> None:
    leases: KeptLeases[Lease] = KeptLeases(Clock())
    leases.done(leases.use(Lease("a")), is_whole=False)
    assert leases.take("a") is None
    assert leases.loads["a"] == 0


def test_loads_are_leases_in_use() -> None:
    leases: KeptLeases[Lease] = KeptLeases(Clock())
    first, _ = leases.use(Lease("a")), leases.use(Lease("a"))
    assert (leases.loads["a"], leases.loads["b"]) == (2, 0)
    leases.done(first, is_whole=True)
    assert leases.loads["a"] == 1
    leases.take("a")
    assert leases.loads["a"] == 2


def test_a_lease_is_not_kept_for_as_long_as_its_replica_keeps_it() -> None:
    clock = Clock()
    leases: KeptLeases[Lease] = KeptLeases(clock)
    old, new = leases.use(Lease("a")), leases.use(Lease("a"))
    leases.done(old, is_whole=True)
    clock.now_s += 0.8 * KEPT_S
    leases.done(new, is_whole=True)
    clock.now_s += 0.8 * KEPT_S
    assert leases.take("a") is new
    assert leases.take("a") is None


def test_what_a_replica_has_ended_is_forgotten() -> None:
    leases: KeptLeases[Lease] = KeptLeases(Clock())
    kept, used = leases.use(Lease("a")), leases.use(Lease("a"))
    leases.done(kept, is_whole=True)
    leases.ended(kept)
    assert leases.take("a") is None
    assert leases.loads["a"] == 1
    leases.done(used, is_whole=False)
    leases.ended(used)
    assert not leases._in_use
    assert not leases._kept
