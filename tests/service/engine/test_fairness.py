"""Several API keys at one engine: shares of rows, blocks and the queue, order within a key, and nobody starves."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.api import FinishReason
from service.engine.fairness import Shares, Waiting
from service.engine.request import Request
from service.engine.scheduler import Scheduler
from tests.service.engine.test_scheduler import planned, scheduler, tokens_of
from tests.support.requests import new_request


def of(owner: str, name: str, length: int = 4, max_tokens: int = 100, **wants: Any) -> Request:
    return new_request(name, length, max_tokens, owner=owner, **wants)


def running(plan: Scheduler) -> Counter[str]:
    return Counter(request.params.owner for request in plan.running)


def turn_once(plan: Scheduler) -> None:
    step = planned(plan)
    plan.check_integrity()
    plan.commit(step, tokens_of(step))


def test_one_key_that_holds_all_rows_gives_way_to_another_up_to_its_share() -> None:
    """One request of 128 choices once kept everybody waiting until its last token."""
    plan = scheduler(num_blocks=1000, rows=8)
    anna = [of("anna", f"a{i}") for i in range(20)]
    for request in anna:
        plan.add(request)
    turn_once(plan)
    assert running(plan) == {"anna": 8}
    ben = [of("ben", f"b{i}") for i in range(20)]
    for request in ben:
        plan.add(request)
    turn_once(plan)
    assert running(plan) == {"anna": 7, "ben": 1}, "one row a step, and at once"
    for _ in range(5):
        turn_once(plan)
    assert running(plan) == {"anna": 4, "ben": 4}
    assert plan.num_preemptions == 4
    assert [request.id for request in anna if request.num_preemptions] == ["a4", "a5", "a6", "a7"], "the newest"
    carl = of("carl", "c0")
    plan.add(carl)
    turn_once(plan)
    assert carl in plan.running
    assert sorted(running(plan).values()) == [1, 3, 4]


def test_a_key_alone_has_everything_and_is_never_put_back() -> None:
    plan = scheduler(num_blocks=1000, rows=8)
    for i in range(20):
        plan.add(of("anna", f"a{i}", max_tokens=5))
    while not plan.is_idle:
        turn_once(plan)
    assert plan.num_preemptions == 0


def test_no_priority_reaches_over_to_another_key() -> None:
    plan = scheduler(num_blocks=1000, rows=1)
    plan.add(of("ben", "b", max_tokens=3))
    turn_once(plan)
    for i in range(3):
        plan.add(of("anna", f"a{i}", max_tokens=3, priority=-100))
    plan.add(of("ben", "late", max_tokens=3))
    started = []
    while not plan.is_idle:
        turn_once(plan)
        started += [request.id for request in plan.admitted]
    assert started == ["a0", "late", "a1", "a2"]
    assert plan.num_preemptions == 0, "each keeps its first one"


def test_rows_go_to_the_key_that_was_served_fewer_tokens() -> None:
    """With one row, long and short requests in turn would give a key of long ones nearly all of the time."""
    plan = scheduler(num_blocks=1000, rows=1)
    for i in range(3):
        plan.add(of("anna", f"a{i}", length=1, max_tokens=100))
    for i in range(30):
        plan.add(of("ben", f"b{i}", length=1, max_tokens=10))
    order = []
    while not plan.is_idle:
        turn_once(plan)
        order += [request.params.owner[0] for request in plan.admitted]
    assert "".join(order) == "abbbbbbbbbbabbbbbbbbbbabbbbbbbbbb"


def test_nobody_saves_up_service_while_away() -> None:
    shares = Shares(4)
    shares.enter("anna")
    shares.charge("anna", 1000)
    shares.enter("ben")
    first, second = of("anna", "a"), of("ben", "b")
    assert shares.order(first)[1] == shares.order(second)[1] == 1000
    shares.charge("anna", 500)
    shares.leave("anna")
    shares.leave("ben")
    shares.enter("ben")
    shares.enter("anna")
    assert shares.order(first)[1] == shares.order(second)[1], "an idle engine forgets who had more"


def test_a_key_that_fills_the_cache_with_long_requests_gives_blocks_back() -> None:
    plan = scheduler(num_blocks=40, block_size=4, rows=8, budget=64)
    for i in range(3):
        plan.add(of("anna", f"a{i}", length=50, max_tokens=2))
    long = of("anna", "long", length=40, max_tokens=100)
    plan.add(long)
    turn_once(plan)
    turn_once(plan)
    ben = of("ben", "b", length=30, max_tokens=2)
    plan.add(ben)
    for _ in range(4):
        turn_once(plan)
    assert ben.has_started
    while not plan.is_idle:
        turn_once(plan)


def test_waiting_requests_come_in_the_order_of_turns() -> None:
    waiting = Waiting()
    requests = [of("anna", "a", priority=1), of("ben", "b"), of("anna", "c")]
    for number, request in enumerate(requests):
        request.number = number
        waiting.add(request)
    assert [request.id for request in waiting] == ["b", "c", "a"]
    assert len(waiting) == 3
    for request in requests:
        waiting.remove(request)
    assert (len(waiting), list(waiting), waiting.heads(lambda _: True)) == (0, [], {})


ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(1, 30),
        st.integers(1, 12),
        st.integers(0, 20),
        st.none() | st.integers(0, 30),
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=150, deadline=None)
@given(ARRIVALS, st.integers(11, 40), st.integers(8, 40), st.integers(1, 5), st.booleans())
def test_every_request_of_every_key_ends_and_within_a_key_in_order(
    arrivals: list[tuple[str, int, int, int, int | None]], num_blocks: int, budget: int, rows: int, is_async: bool
) -> None:
    """However scarce blocks and rows are, nobody is put back for ever, and nothing leaks."""
    plan = scheduler(num_blocks=num_blocks, block_size=4, rows=min(rows, budget), budget=budget)
    requests = [(of(owner, str(i), length, most), at, cut) for i, (owner, length, most, at, cut) in enumerate(arrivals)]
    started: dict[str, list[int]] = defaultdict(list)
    in_flight = None
    for turn in range(3000):
        for request, at, cut in requests:
            if at == turn:
                plan.add(request)
            if cut is not None and at + cut == turn and not request.is_finished:
                plan.finish(request, FinishReason.ABORT, 1.0)
        step = plan.schedule(0.0)
        plan.check_integrity()
        for request in plan.admitted:
            started[request.params.owner].append(request.number)
        done, in_flight = (in_flight, step) if is_async else (step, None)
        if done is not None:
            plan.commit(done, tokens_of(done))
        if turn > 60 and plan.is_idle and in_flight is None:
            break
    assert plan.is_idle
    assert plan.pool.num_free == num_blocks
    assert all(request.is_finished for request, *_ in requests)
    assert all(numbers == sorted(numbers) for numbers in started.values())


@settings(max_examples=100, deadline=None)
@given(
    greedy=st.integers(1, 60),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=10),
    rows=st.integers(2, 8),
    num_others=st.integers(0, 3),
)
def test_a_key_below_its_share_starts_within_a_few_steps(
    greedy: int, lengths: list[int], rows: int, num_others: int
) -> None:
    """Whatever others hold and have queued, as long as there are rows for all keys."""
    plan = scheduler(num_blocks=10_000, rows=rows, budget=512)
    for i in range(greedy):
        plan.add(of("anna", f"a{i}", lengths[i % len(lengths)], max_tokens=10_000, priority=-100))
    for owner in range(min(num_others, rows - 2)):
        plan.add(of(f"other{owner}", f"o{owner}", max_tokens=10_000))
    for _ in range(5):
        turn_once(plan)
    ben = of("ben", "b", max_tokens=10)
    plan.add(ben)
    for _ in range(2):
        turn_once(plan)
    assert ben.has_started


@pytest.mark.parametrize("others", [0, 1, 3])
def test_each_of_several_keys_gets_its_share_of_rows(others: int) -> None:
    """A key of long answers beside keys of short ones: over time each has as many rows."""
    plan = scheduler(num_blocks=10_000, rows=4, budget=64)
    owners = ["anna", *(f"o{i}" for i in range(others))]
    for i in range(200):
        plan.add(of("anna", f"a{i}", 5, 20))
        for owner in owners[1:]:
            for part in range(4):
                plan.add(of(owner, f"{owner}-{i}-{part}", 3, 4))
    rows: Counter[str] = Counter()
    for _ in range(400):
        step = planned(plan)
        rows.update(chunk.request.params.owner for chunk in step.chunks)
        plan.commit(step, tokens_of(step))
    assert max(rows.values()) - min(rows.values()) <= 0.05 * 400 * 4
