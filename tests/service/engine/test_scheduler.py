"""The scheduler alone: lengths, blocks and rows, over every order of events that hypothesis finds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.api import FinishReason
from service.engine.drafts.speculation import Speculation
from service.engine.request import Request
from service.engine.scheduler import Scheduler, Step, StepResults
from service.errors import EngineFailed
from tests.support.eager import Eager
from tests.support.requests import Anything, new_request

EOS = 7


def scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    rows: int = 8,
    budget: int = 32,
    speculation: Speculation | None = None,
) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_requests=rows,
        max_batched_tokens=budget,
        eos_ids=frozenset({EOS}),
        speculation=speculation,
    )


def planned(plan: Scheduler) -> Step:
    """The next step, where there must be one."""
    step = plan.schedule(0.0)
    assert step is not None
    return step


def tokens_of(step: Step, first_id: int = 1000) -> StepResults:
    return StepResults(0.0, [first_id + i for i, _ in enumerate(c for c in step.chunks if c.samples)])


def took(plan: Scheduler, step: Step, *token_ids: int, faults: dict[int, Exception] | None = None) -> list[Request]:
    """The requests that took a token, or a fault, of a step."""
    return [request for _, request in plan.commit(step, StepResults(0.0, token_ids, faults or {}))]


def test_decodes_come_before_prefills_and_a_prompt_is_cut_to_the_budget() -> None:
    plan = scheduler(budget=10)
    speaking, long = new_request("a", 3), new_request("b", 25)
    plan.add(speaking)
    plan.commit(step := planned(plan), tokens_of(step))
    plan.add(long)
    lengths = []
    for _ in range(3):
        step = planned(plan)
        lengths.append([(c.request.id, c.start, c.length, c.samples) for c in step.chunks])
        plan.commit(step, tokens_of(step))
    assert lengths == [
        [("a", 3, 1, True), ("b", 0, 9, False)],
        [("a", 4, 1, True), ("b", 9, 9, False)],
        [("a", 5, 1, True), ("b", 18, 7, True)],
    ]


def test_the_step_after_the_one_in_flight_can_be_planned() -> None:
    plan = scheduler()
    request = new_request("a", 3, max_tokens=3)
    plan.add(request)
    first = planned(plan)
    second = planned(plan)
    third = planned(plan)
    assert [(s.chunks[0].start, s.chunks[0].index) for s in (first, second, third)] == [(0, 0), (3, 1), (4, 2)]
    assert plan.schedule(0.0) is None, "max_tokens are already on their way"
    for step in (first, second, third):
        plan.commit(step, tokens_of(step))
    assert request.finish_reason == FinishReason.LENGTH
    assert plan.is_idle
    plan.check_integrity()


def test_a_stop_is_noticed_late_and_the_extra_token_is_dropped() -> None:
    plan = scheduler()
    request = new_request("a", 3, max_tokens=9)
    plan.add(request)
    first, second = planned(plan), planned(plan)
    assert took(plan, first, EOS) == [request]
    assert took(plan, second, 55) == []
    assert request.output_ids == [EOS]
    assert request.finish_reason == FinishReason.STOP
    plan.check_integrity()


def test_ignore_eos_goes_on() -> None:
    plan = scheduler()
    request = new_request("a", 3, max_tokens=2, ignore_eos=True)
    plan.add(request)
    for _ in range(2):
        took(plan, step := planned(plan), EOS)
    assert len(request.output_ids) == 2
    assert request.finish_reason == FinishReason.LENGTH
    assert step.is_decode


def test_the_youngest_is_preempted_and_computed_again() -> None:
    plan = scheduler(num_blocks=4, block_size=4)
    old, young = new_request("old", 7, max_tokens=6), new_request("young", 6, max_tokens=6)
    plan.add(old)
    plan.add(young)
    while not plan.is_idle:
        step = planned(plan)
        plan.check_integrity()
        plan.commit(step, tokens_of(step))
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert len(old.output_ids) == len(young.output_ids) == 6
    assert plan.num_preemptions == 1


def test_what_was_generated_is_computed_again_token_by_token() -> None:
    """In as many chunks as the step has to spare; with none to spare, in as many steps."""
    plan = scheduler(rows=4)
    request, *others = (new_request(name, size, 20) for name, size in (("a", 9), ("b", 3), ("c", 3)))
    plan.add(request)
    for _ in range(7):
        plan.commit(step := planned(plan), tokens_of(step))
    plan._preempt(request)
    plan.pool.forget(list(range(plan.pool.num_blocks)))
    step = planned(plan)
    again = [(0, 9, False), (9, 1, False), (10, 1, False), (11, 1, False)]
    assert [(c.start, c.length, c.samples) for c in step.chunks] == again
    assert (step.num_requests, step.num_tokens, step.is_decode) == (1, 12, False)
    num_steps = request.num_steps
    plan.commit(step, tokens_of(step))
    assert request.num_steps == num_steps + 1
    for other in others:
        plan.add(other)
    step = planned(plan)
    assert [(c.start, c.length, c.samples) for c in step.chunks] == [(i, 1, i == 15) for i in range(12, 16)]
    plan.commit(step, tokens_of(step))
    assert planned(plan).num_requests == 3, "the others had no chunk left"


def test_a_request_with_a_grammar_waits_for_its_last_token_and_nobody_else_does() -> None:
    plan = scheduler()
    held, free = new_request("held", 3, matcher=Anything()), new_request("free", 3)
    plan.add(held)
    plan.add(free)
    first, second = planned(plan), planned(plan)
    assert [[c.request for c in step.chunks] for step in (first, second)] == [[held, free], [free]]
    plan.commit(first, tokens_of(first))
    third = planned(plan)
    assert [(c.request, c.start) for c in third.chunks] == [(held, 3), (free, 4)]


def test_the_end_token_of_a_grammar_ends_even_under_ignore_eos() -> None:
    plan = scheduler()
    request = new_request("a", 3, max_tokens=9, ignore_eos=True, matcher=Anything())
    plan.add(request)
    took(plan, planned(plan), EOS)
    assert request.finish_reason == FinishReason.STOP


def test_an_error_ends_its_request_alone() -> None:
    plan = scheduler()
    lost, kept = new_request("lost", 3), new_request("kept", 3)
    plan.add(lost)
    plan.add(kept)
    first, second = planned(plan), planned(plan)
    assert took(plan, first, 0, 50, faults={0: EngineFailed("why")}) == [lost, kept]
    assert lost.finish_reason == FinishReason.ABORT
    assert (lost.output_ids, lost.blocks, lost.row) == ([], [], -1)
    assert took(plan, second, 51, 52) == [kept]
    assert kept.output_ids == [50, 52]
    plan.check_integrity()


Planned = tuple[tuple[int, int, int, int | None], dict[str, Any]]
REQUEST = st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 30), st.none() | st.integers(0, 30))
WANTS = st.fixed_dictionaries(
    {"prompt_logprobs": st.sampled_from([None, 0, 3]), "grammar": st.sampled_from([None, Anything()])}
)


@settings(max_examples=150, deadline=None)
@given(
    plans=st.lists(st.tuples(REQUEST, WANTS), min_size=1, max_size=12),
    num_blocks=st.integers(11, 24),
    budget=st.integers(8, 40),
    is_async=st.booleans(),
    num_ids=st.none() | st.integers(1, 4),
)
def test_every_request_ends_and_nothing_leaks(
    plans: list[Planned], num_blocks: int, budget: int, is_async: bool, num_ids: int | None
) -> None:
    """Few blocks, arrivals and aborts at any step, with and without a step in flight: each request gets exactly its
    tokens, no step touches a slot its request does not own, all blocks and rows come back, a prompt is scored once
    however often it is computed, and a grammar has read every token before the next is planned. With num_ids, the
    answers have so few tokens that they repeat, and drafts are tried."""
    speculation = Eager(3, 5) if num_ids else None
    plan = scheduler(num_blocks=num_blocks, block_size=4, rows=5, budget=budget, speculation=speculation)
    requests = [
        new_request(str(i), length, max_tokens, **wants) for i, ((length, max_tokens, _, _), wants) in enumerate(plans)
    ]
    aborted: set[Request] = set()
    in_flight: Step | None = None
    scored: dict[Request, list[int]] = {request: [] for request in requests}
    for turn in range(1500):
        for request, ((_, _, arrival, delay), _) in zip(requests, plans, strict=True):
            if arrival == turn:
                plan.add(request)
            if delay is not None and arrival + delay == turn and not request.is_finished:
                plan.finish(request, FinishReason.ABORT, 1.0)
                aborted.add(request)
        step = plan.schedule(0.0)
        plan.check_integrity()
        if step is not None:
            assert 0 < step.num_tokens <= budget
            rows = [chunk.request.row for chunk in step.chunks]
            assert len(set(rows)) == step.num_requests
            assert len(step.chunks) <= 5
            assert min(rows) >= 0
            for before, chunk in pairwise(step.chunks):
                assert chunk.request is not before.request or chunk.start == before.start + before.length
            for chunk in step.chunks:
                assert chunk.length == 1 or chunk.start + chunk.length <= len(chunk.request.prompt_ids)
                assert len(chunk.request.blocks) * 4 >= chunk.start + chunk.length
                assert chunk.request.matcher is None or chunk.request.num_pending == chunk.samples
                assert set(chunk.scored) <= set(range(chunk.start, chunk.start + chunk.length))
                scored[chunk.request] += chunk.scored
        done, in_flight = (in_flight, step) if is_async else (step, None)
        if done is not None:
            ids = [i % num_ids if num_ids else 1000 + i for i, _ in enumerate(c for c in done.chunks if c.samples)]
            plan.commit(done, StepResults(0.0, ids))
        if turn > 60 and plan.is_idle and in_flight is None:
            break
    assert plan.is_idle
    assert plan.pool.num_free == num_blocks
    for request in requests:
        assert request.finish_reason == (FinishReason.ABORT if request in aborted else FinishReason.LENGTH)
        assert request in aborted or len(request.output_ids) == request.params.max_tokens
        wanted = list(range(len(request.prompt_ids) - 1)) if request.params.prompt_logprobs is not None else []
        assert scored[request] == (wanted[: len(scored[request])] if request in aborted else wanted)


def test_a_lower_number_starts_first_and_equals_in_the_order_of_arrival() -> None:
    plan = scheduler(rows=1, budget=16)
    requests = [new_request(name, 5, 1, priority=level) for name, level in (("a", 1), ("b", 0), ("c", 1), ("d", -1))]
    for request in requests:
        plan.add(request)
    order = []
    while (step := plan.schedule(0.0)) is not None:
        order += [chunk.request.id for chunk in step.chunks]
        plan.commit(step, tokens_of(step))
    assert order == ["d", "b", "a", "c"]


def test_the_lowest_priority_gives_way_and_starts_again_before_new_ones_of_its_own() -> None:
    plan = scheduler(num_blocks=6, block_size=4, rows=3)
    urgent, idle, late = (new_request(name, 7, 12, priority=level) for name, level in (("u", 0), ("i", 5), ("l", 5)))
    plan.add(idle)
    step = planned(plan)
    plan.commit(step, tokens_of(step))
    plan.add(urgent)
    while idle.num_preemptions == 0:
        step = planned(plan)
        plan.commit(step, tokens_of(step))
    assert urgent.num_preemptions == 0, "though it is the newer one"
    plan.add(late)
    assert list(plan.waiting) == [idle, late]
    plan.admits_new = False
    while not idle.is_finished:
        step = planned(plan)
        plan.commit(step, tokens_of(step))
    assert list(plan.waiting) == [late]
    assert plan.is_drained


def test_draining_passes_by_new_requests_of_a_higher_priority() -> None:
    plan = scheduler()
    preempted, urgent = new_request("p", 5, 1, priority=3), new_request("u", 5, 1)
    preempted.first_scheduled_s = 1.0
    plan.add(preempted)
    plan.add(urgent)
    plan.admits_new = False
    assert [chunk.request for chunk in planned(plan).chunks] == [preempted]
    assert plan.schedule(0.0) is None


def test_short_prompts_are_read_beside_a_long_one_and_neither_starves() -> None:
    plan = Scheduler(num_blocks=400, block_size=4, max_num_requests=8, max_batched_tokens=32, has_prefix_cache=False)
    long = new_request("long", 300, 1)
    plan.add(long)
    step = planned(plan)
    assert step.num_tokens == 32, "all of it while nobody else is there"
    plan.commit(step, tokens_of(step))
    num_steps = 0
    while not long.is_finished:
        plan.add(new_request(f"short {num_steps}", 10, 1))
        step = planned(plan)
        lengths = {chunk.request.id: chunk.length for chunk in step.chunks}
        assert lengths[f"short {num_steps}"] == 10 or long.num_computed == 300, "it is read in the step after it came"
        assert lengths["long"] >= 16 or long.num_computed == 300
        assert step.num_tokens <= 32
        plan.commit(step, tokens_of(step))
        num_steps += 1
    assert num_steps <= (300 - 32) / 22 + 1


def test_a_long_prompt_leaves_nothing_to_those_who_cannot_start() -> None:
    plan = Scheduler(num_blocks=30, block_size=4, max_num_requests=2, max_batched_tokens=32, has_prefix_cache=False)
    plan.add(new_request("long", 100, 1))
    plan.add(new_request("no room", 90, 1))
    plan.add(new_request("short", 10, 1))
    for _ in range(3):
        step = planned(plan)
        assert [(chunk.request.id, chunk.length) for chunk in step.chunks] == [("long", 32)]
        plan.commit(step, tokens_of(step))


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5])
def test_prompts_go_on_beside_decodes_however_small_steps_are(budget: int) -> None:
    """Also where the decodes leave room for one row or two."""
    for num_decoding in range(budget):
        for length in (2, 3, 9):
            plan = Scheduler(
                num_blocks=400,
                block_size=4,
                max_num_requests=budget + 1,
                max_batched_tokens=budget,
                has_prefix_cache=False,
            )
            for i in range(num_decoding):
                plan.add(new_request(f"d{i}", 1, 300))
                step = planned(plan)
                plan.commit(step, tokens_of(step))
            prompts = [new_request(f"p{i}", length, 1) for i in range(2)]
            for request in prompts:
                plan.add(request)
            for _ in range(8 * length):
                following = plan.schedule(0.0)
                if following is not None:
                    plan.commit(following, tokens_of(following))
            assert all(request.is_finished for request in prompts), (num_decoding, length)


def test_pieces_have_two_rows_where_a_step_has_room_for_three() -> None:
    for budget in (3, 4, 7, 8):
        plan = Scheduler(
            num_blocks=400, block_size=4, max_num_requests=4, max_batched_tokens=budget, has_prefix_cache=False
        )
        for i in range(6):
            plan.add(new_request(str(i), 2 + 5 * i, 1))
        while (step := plan.schedule(0.0)) is not None:
            assert all(chunk.length > 1 for chunk in step.chunks)
            plan.commit(step, tokens_of(step))


def test_decodes_leave_no_single_row_to_a_second_prompt() -> None:
    """The first prompt has what the decodes leave, even one row, and goes on; the next waits for room."""
    plan = Scheduler(num_blocks=400, block_size=4, max_num_requests=8, max_batched_tokens=8, has_prefix_cache=False)
    for i in range(4):
        plan.add(new_request(f"d{i}", 2, 300))
    plan.commit(step := planned(plan), tokens_of(step))
    for name, length in (("a", 3), ("b", 9), ("c", 9)):
        plan.add(new_request(name, length, 1))
    pieces: dict[str, list[int]] = {}
    for _ in range(12):
        plan.commit(step := planned(plan), tokens_of(step))
        for chunk in step.chunks[4:]:
            pieces.setdefault(chunk.request.id, []).append(chunk.length)
    assert {name: sum(lengths) for name, lengths in pieces.items()} == {"a": 3, "b": 9, "c": 9}
    assert min(min(lengths) for lengths in pieces.values()) > 1


def test_an_urgent_prompt_does_not_give_way_to_the_answer_of_an_idle_one() -> None:
    plan = Scheduler(num_blocks=10, block_size=4, max_num_requests=4, max_batched_tokens=6, has_prefix_cache=False)
    idle, urgent = new_request("idle", 5, 30, priority=10), new_request("urgent", 24, 2, priority=-10)
    plan.add(idle)
    for _ in range(8):
        step = planned(plan)
        plan.commit(step, tokens_of(step))
    plan.add(urgent)
    while not urgent.is_finished:
        step = planned(plan)
        plan.commit(step, tokens_of(step))
    assert urgent.num_preemptions == 0
    while (following := plan.schedule(0.0)) is not None:
        plan.commit(following, tokens_of(following))
    assert idle.is_finished


def test_a_prompt_leaves_nothing_for_a_row_that_it_takes_itself() -> None:
    plan = Scheduler(num_blocks=400, block_size=4, max_num_requests=1, max_batched_tokens=64, has_prefix_cache=False)
    for name in ("a", "b"):
        plan.add(new_request(name, 192, 1))
    lengths = []
    while (step := plan.schedule(0.0)) is not None:
        lengths.append(step.num_tokens)
        plan.commit(step, tokens_of(step))
    assert lengths == [64] * 6
