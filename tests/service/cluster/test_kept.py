"""Leases that a gateway uses for one request after the other, over a Ray that grants when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import pytest

from service.cluster import kept
from service.cluster.exchange import Unreachable
from service.cluster.kept import IDLE_IN_GATEWAY_S, LEASE_S, MAX_ASKING, PATIENCE_S, KeptLeases
from service.cluster.leases import IDLE_IN_REPLICA_S
from service.errors import QueueFull, QueueTimeout

MAX_WAITING = 60


@dataclass(eq=False)
class Lease:
    replica: str
    leases: Kept
    is_over: bool = False

    def done(self, is_whole: bool) -> None:
        if not self.leases.done(self, is_whole):
            self.is_over = True


Kept = KeptLeases[Lease]


@dataclass
class Ray:
    """What it is asked for, and what has been decided. keys: as a test names a request, such as "a1", best for a."""

    now_s: float = 100.0
    asked: list[tuple[str, asyncio.Future[str]]] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    leases: Kept = field(init=False)

    def __post_init__(self) -> None:
        self.leases = KeptLeases(
            self._ask,
            self._best,
            lambda name: name not in self.gone,
            max_waiting=lambda: MAX_WAITING,
            timeout_s=30.0,
            now_s=lambda: self.now_s,
        )

    async def grant(self, replica: str, which: int = 0) -> None:
        """Grant the oldest lease that was asked for, or another one."""
        self.asked.pop(which)[1].set_result(replica)
        await turns()

    async def refuse(self, error: Exception, which: int = 0) -> None:
        self.asked.pop(which)[1].set_exception(error)
        await turns()

    def request(self, key: str, avoid: Set[str] = frozenset()) -> asyncio.Task[Lease]:
        return asyncio.ensure_future(self.leases.lease([key.encode()], avoid))

    async def leased(self, key: str, avoid: Set[str] = frozenset()) -> Lease:
        """A lease that there is already."""
        wanted = self.request(key, avoid)
        await turns()
        assert wanted.done()
        return wanted.result()

    async def new(self, replica: str) -> Lease:
        """One that Ray grants."""
        wanted = self.request(replica)
        await turns()
        await self.grant(replica, -1)
        return wanted.result()

    async def _ask(self, keys: Sequence[bytes], _: Set[str]) -> Lease:
        name = keys[0].decode()
        decided: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.asked.append((name, decided))
        try:
            return Lease(await decided, self.leases)
        except asyncio.CancelledError:
            self.asked = [(other, future) for other, future in self.asked if future is not decided]
            self.given_up.append(name)
            raise

    @staticmethod
    def _best(keys: Sequence[bytes], _: Set[str], loads: Mapping[str, int]) -> str:
        assert all(load >= 0 for load in loads.values())
        return keys[0].decode()[0]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def with_ray(test: Callable[[Ray], Awaitable[None]]) -> Callable[[], None]:
    """A test that runs on an event loop, after which nobody uses a lease and Ray is asked for none."""

    def run() -> None:
        async def go() -> None:
            ray = Ray()
            await test(ray)
            await turns()
            assert not ray.leases.loads
            assert (ray.leases.num_waiting, ray.leases.num_asking) == (0, 0)

        asyncio.run(go())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@with_ray
async def test_a_lease_is_used_again_by_one_request_at_a_time(ray: Ray) -> None:
    lease = await ray.new("a")
    assert dict(ray.leases.loads) == {"a": 1}
    second = ray.request("a")
    await turns()
    assert not second.done(), "it is in use"
    await ray.grant("a")
    lease.done(is_whole=True)
    assert dict(ray.leases.loads) == {"a": 1}
    third = ray.request("b")
    await turns()
    assert not third.done(), "it is another replica's"
    await ray.grant("b")
    assert await ray.leased("a") is lease
    for used in (lease, second.result(), third.result()):
        used.done(is_whole=True)
    assert ray.leases.num_idle == 3


@with_ray
async def test_a_lease_whose_answer_was_cut_off_is_not_used_again(ray: Ray) -> None:
    lease = await ray.new("a")
    lease.done(is_whole=False)
    assert lease.is_over
    assert ray.leases.num_idle == 0


@with_ray
async def test_a_lease_is_not_kept_for_as_long_as_its_replica_keeps_it(ray: Ray) -> None:
    assert IDLE_IN_GATEWAY_S < IDLE_IN_REPLICA_S
    old, new = await ray.new("a"), await ray.new("a")
    old.done(is_whole=True)
    ray.now_s += 0.8 * IDLE_IN_GATEWAY_S
    new.done(is_whole=True)
    ray.now_s += 0.8 * IDLE_IN_GATEWAY_S
    assert await ray.leased("a") is new
    third = ray.request("a")
    await turns()
    assert ray.names == ["a"]
    await ray.grant("a")
    assert third.result() not in (old, new)
    third.result().done(is_whole=True)
    new.done(is_whole=True)


@with_ray
async def test_many_at_once_are_served_by_the_few_leases_that_ray_has_granted(ray: Ray) -> None:
    """Ray grants a few hundred a second. Were each request to wait for one of its own, more than that could never be
    served, however many places there are: so it was, and a burst was enough."""
    requests = [ray.request(f"a{number}") for number in range(50)]
    await turns()
    assert len(ray.asked) == MAX_ASKING
    await ray.grant("a")
    served = []
    while pending := [request for request in requests if request not in served]:
        assert pending[0].done(), f"{len(pending)} wait although a lease is free"
        assert not any(request.done() for request in pending[1:]), "one lease serves one at a time, in their order"
        served.append(pending[0])
        # Longer than anybody is patient.
        ray.now_s += 0.1
        pending[0].result().done(is_whole=True)
        await turns()
    # Nobody waits, so nothing is asked for any more.
    assert (ray.leases.num_idle, len(ray.asked), len(ray.given_up)) == (1, 0, MAX_ASKING)
    late = [ray.request("a51"), ray.request("a52")]
    await turns()
    assert [each.done() for each in late] == [True, False]
    await ray.grant("a")
    for each in late:
        (await each).done(is_whole=True)


@with_ray
async def test_a_free_lease_goes_to_whom_it_suits_and_to_others_once_they_have_lost_their_patience(ray: Ray) -> None:
    of_a, other_a, of_b = await ray.new("a"), await ray.new("a"), await ray.new("b")
    wants_b, wants_a = ray.request("b1"), ray.request("a1")
    await turns()
    of_a.done(is_whole=True)
    await turns()
    assert (wants_b.done(), wants_a.done()) == (False, True), "the other one has waited longer, for another replica"
    ray.now_s += PATIENCE_S
    picky = ray.request("b2", frozenset({"a"}))
    await turns()
    ray.now_s += PATIENCE_S
    other_a.done(is_whole=True)
    await turns()
    assert wants_b.result() is other_a
    wants_a.result().done(is_whole=True)
    await turns()
    assert not picky.done(), "it avoids this replica"
    of_b.done(is_whole=True)
    assert await picky is of_b
    while ray.asked:
        await ray.grant("a")
    for used in (other_a, of_b):
        used.done(is_whole=True)


@with_ray
async def test_a_lease_goes_back_to_ray_after_its_time(ray: Ray) -> None:
    """Other gateways need places, too."""
    lease = await ray.new("a")
    ray.now_s += LEASE_S[0]
    lease.done(is_whole=True)
    assert await ray.leased("a") is lease
    ray.now_s += LEASE_S[1] - LEASE_S[0]
    lease.done(is_whole=True)
    assert lease.is_over
    assert ray.leases.num_idle == 0


@with_ray
async def test_a_replica_that_takes_no_more_gets_none(ray: Ray) -> None:
    lease = await ray.new("a")
    waiting = ray.request("a1")
    await turns()
    ray.gone.add("a")
    lease.done(is_whole=True)
    await turns()
    assert lease.is_over
    assert not waiting.done()
    await ray.grant("b")
    (await waiting).done(is_whole=True)


@pytest.mark.parametrize("error", [QueueFull("full"), Unreachable("gone"), RuntimeError("a bug")])
def test_whoever_asked_is_told_that_it_was_refused(error: Exception) -> None:
    @with_ray
    async def go(ray: Ray) -> None:
        first, second = ray.request("a1"), ray.request("a2")
        await turns()
        await ray.refuse(error, 1)
        with pytest.raises(type(error)):
            await second
        assert not first.done()
        await ray.grant("a")
        first.result().done(is_whole=True)

    go()


async def served_while_another_waits(
    ray: Ray, key: str, avoid: Set[str] = frozenset()
) -> tuple[Lease, asyncio.Task[Lease]]:
    """The lease of a request that got it before Ray granted its own, and one that waits for what that asked for."""
    lease = await ray.new("a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "MAX_ASKING", 1)
        first, waiting = ray.request("a1"), ray.request(key, avoid)
        await turns()
    lease.done(is_whole=True)
    assert await first is lease
    assert ray.names == ["a1"]
    return lease, waiting


@with_ray
async def test_a_refusal_of_one_that_is_served_already_is_nobodys(ray: Ray) -> None:
    """Another one waits by its request to Ray, and gets one of its own."""
    lease, waiting = await served_while_another_waits(ray, "b")
    await ray.refuse(Unreachable("gone"))
    assert not waiting.done()
    assert ray.names == ["b"]
    await ray.grant("a")
    for used in (lease, waiting.result()):
        used.done(is_whole=True)


@with_ray
async def test_a_lease_that_whoever_waits_must_avoid_is_ended_and_asked_for_again(ray: Ray) -> None:
    """It is not kept: its replica would hold a place for a first request that does not come."""
    lease, waiting = await served_while_another_waits(ray, "b", frozenset({"a"}))
    await ray.grant("a")
    assert not waiting.done()
    assert (ray.leases.num_idle, ray.leases.loads) == (0, {"a": 1})
    assert ray.names == ["b"]
    await ray.grant("b")
    for used in (lease, await waiting):
        used.done(is_whole=True)


def test_a_bug_shows_although_nobody_waits_for_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    @with_ray
    async def go(ray: Ray) -> None:
        lease, waiting = await served_while_another_waits(ray, "b")
        await ray.refuse(RuntimeError("a bug"))
        await ray.grant("b")
        for used in (lease, await waiting):
            used.done(is_whole=True)

    go()
    assert "RuntimeError: a bug" in caplog.text


@with_ray
async def test_who_leaves_is_not_asked_for_any_more(ray: Ray) -> None:
    first, second = ray.request("a1"), ray.request("a2")
    await turns()
    first.cancel()
    await turns()
    assert ray.given_up == ["a1"]
    await ray.grant("a")
    second.result().done(is_whole=True)


@with_ray
async def test_a_lease_that_comes_as_its_request_leaves_is_kept(ray: Ray) -> None:
    lease = await ray.new("a")
    request = ray.request("a1")
    await turns()
    lease.done(is_whole=True)
    request.cancel()
    await turns()
    assert request.cancelled()
    assert await ray.leased("a") is lease
    lease.done(is_whole=True)


@pytest.mark.parametrize("how", ["done", "grant", "refuse"])
def test_a_client_that_has_just_left_gets_none(how: str) -> None:
    """It still waits, until its task runs next; what comes in between is the next one's, or kept."""

    @with_ray
    async def go(ray: Ray) -> None:
        lease = await ray.new("a")
        gone, other = ray.request("a1"), ray.request("a2")
        await turns()
        if how == "done":
            gone.cancel()
            lease.done(is_whole=True)
        elif how == "grant":
            ray.asked.pop(0)[1].set_result("a")
            gone.cancel()
        else:
            ray.asked.pop(0)[1].set_exception(Unreachable("gone"))
            gone.cancel()
        await turns()
        assert gone.cancelled()
        assert other.done() == (how != "refuse")
        while ray.asked:
            await ray.grant("a")
        used = await other
        assert dict(ray.leases.loads) == {"a": 1 + (used is not lease)}
        used.done(is_whole=True)
        if used is not lease:
            lease.done(is_whole=True)

    go()


def test_a_kept_lease_of_a_replica_that_takes_no_more_is_given_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "PATIENCE_S", 0.01)

    @with_ray
    async def go(ray: Ray) -> None:
        of_a = await ray.new("a")
        of_a.done(is_whole=True)
        ray.gone.add("a")
        waiting = ray.request("b1")
        await asyncio.sleep(0.03)
        assert not waiting.done()
        await ray.grant("b")
        (await waiting).done(is_whole=True)

    go()


def test_a_kept_lease_is_given_to_whoever_loses_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to the next one that comes for that replica."""
    monkeypatch.setattr(kept, "PATIENCE_S", 0.01)

    @with_ray
    async def go(ray: Ray) -> None:
        of_a = await ray.new("a")
        waiting, picky = ray.request("b1"), ray.request("b2", frozenset({"a"}))
        await turns()
        of_a.done(is_whole=True)
        assert ray.leases.num_idle == 1
        assert await asyncio.wait_for(waiting, 10) is of_a
        newcomer = ray.request("a1")
        await asyncio.sleep(0.03)
        assert (picky.done(), newcomer.done(), ray.leases.num_idle) == (False, False, 0)
        while ray.asked:
            await ray.grant("b")
        for used in (of_a, await picky, await newcomer):
            used.done(is_whole=True)

    go()


@with_ray
async def test_no_more_wait_than_may(ray: Ray) -> None:
    waiting = [ray.request(f"a{number}") for number in range(MAX_WAITING)]
    await turns()
    with pytest.raises(QueueFull, match=f"^{MAX_WAITING} requests wait"):
        await ray.request("a")
    while ray.asked:
        await ray.grant("a")
    for request in waiting:
        (await request).done(is_whole=True)


def test_who_waits_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    @with_ray
    async def go(ray: Ray) -> None:
        monkeypatch.setattr(ray.leases, "_timeout_s", 0.01)
        with pytest.raises(QueueTimeout, match=r"within 0\.01 s; send it again later"):
            await ray.request("a")
        await turns()
        assert ray.given_up == ["a"]

    go()


@pytest.mark.parametrize("ended_first", [False, True])
def test_what_a_replica_has_ended_is_forgotten(ended_first: bool) -> None:
    @with_ray
    async def go(ray: Ray) -> None:
        kept, used = await ray.new("a"), await ray.new("a")
        kept.done(is_whole=True)
        ray.leases.ended(kept)
        assert ray.leases.num_idle == 0
        if ended_first:
            ray.leases.ended(used)
        ray.leases.done(used, is_whole=False)
        ray.leases.ended(used)

    go()
