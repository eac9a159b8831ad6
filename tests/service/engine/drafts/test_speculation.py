"""When drafts pay, and what the scheduler makes of them."""

from __future__ import annotations

import asyncio
from itertools import groupby
from typing import Any

import pytest
import torch

from quant.scheme import PRESETS
from service.engine.api import FinishReason, Progress, SamplingParams, Token
from service.engine.client import EngineClient
from service.engine.drafts.drafter import Drafter
from service.engine.drafts.speculation import TRIAL_EVERY, TRIAL_LENGTH, Speculation
from service.engine.messages import Gauges, News
from service.engine.request import Request
from service.engine.scheduler import Scheduler, Step, StepResults
from service.engine.shapes import Shape
from service.errors import EngineFailed
from service.models.config import ModelConfig
from service.models.random_weights import random_decoder
from tests.support.eager import Eager
from tests.support.engines import CPU, make_engine
from tests.support.requests import Anything, new_request
from tests.support.tiny_models import make_model

EOS = 7


def repeating(name: str, max_tokens: int = 100, hit_rate: float = 1.0, length: int = 12, **params: Any) -> Request:
    """A request whose prompt is 1, 2, 3, 1, 2 and so on."""
    request = new_request(name, 0, max_tokens, **params)
    request.prompt_ids += [1 + i % 3 for i in range(length)]
    request.drafter = Drafter(request.prompt_ids)
    request.drafter.hit_rate = hit_rate
    return request


def captured(**times_s: float) -> dict[Shape, float]:
    """Times of captured decodes: by r1, r2 and so on, their rows."""
    return {Shape(int(rows[1:]), int(rows[1:]), is_decode=True): time_s for rows, time_s in times_s.items()}


def test_drafts_pay_if_they_yield_more_tokens_a_second() -> None:
    request = repeating("a")
    assert Speculation(3, 64, captured(r1=1.0, r2=1.0, r4=1.1)).plan([request]) == {request: 3}
    assert Speculation(3, 64, captured(r1=1.0, r2=3.0, r4=5.0)).plan([request]) == {}
    assert Speculation(3, 64, captured(r1=1.0, r2=1.2, r4=5.0)).plan([request]) == {request: 1}, "fewer pay"


def test_who_seldom_guesses_right_does_not_draft() -> None:
    flat = captured(r1=1.0, r2=1.0, r4=1.0, r8=1.0)
    for hit_rate, depth in ((0.0, 0), (0.29, 0), (0.5, 1), (0.6, 2), (0.9, 7)):
        request = repeating("a", hit_rate=hit_rate)
        assert Speculation(7, 64, flat).plan([request]) == ({request: depth} if depth else {}), hit_rate
    often, seldom = repeating("a"), repeating("b", hit_rate=0.1)
    assert Speculation(3, 64, captured(r2=1.0, r4=1.0, r8=1.0)).plan([often, seldom]) == {often: 3}


def test_without_times_a_step_of_each_kind_is_measured_first() -> None:
    request, speculation = repeating("a"), Speculation(3, 64)
    assert speculation.plan([request]) == {}, "what a plain step takes is not known"
    speculation.observe(1, has_drafts=False, time_s=1.0)
    assert speculation.plan([request]) == {request: 3}
    speculation.observe(4, has_drafts=True, time_s=9.0)
    assert speculation.plan([request]) == {request: 1}
    speculation.observe(2, has_drafts=True, time_s=9.0)
    assert speculation.plan([request]) == {}


def test_what_real_steps_take_replaces_what_was_measured() -> None:
    request, speculation = repeating("a"), Speculation(1, 64, captured(r1=1.0, r2=1.1))
    assert speculation.plan([request]) == {request: 1}
    for _ in range(20):
        speculation.observe(2, has_drafts=True, time_s=2.5)
    assert speculation.plan([request]) == {}, "they could not overlap, say"
    for _ in range(20):
        speculation.observe(1, has_drafts=False, time_s=2.5)
    assert speculation.plan([request]) == {request: 1}


def test_a_step_that_was_held_up_says_little() -> None:
    request, speculation = repeating("a"), Speculation(1, 64, captured(r1=1.0, r2=1.0))
    speculation.observe(2, has_drafts=True, time_s=100.0)
    assert speculation.plan([request]) == {request: 1}
    for _ in range(20):
        speculation.observe(2, has_drafts=True, time_s=100.0)
    assert speculation.plan([request]) == {}


@pytest.mark.parametrize("time_s", [1.0, 9.0], ids=["paying", "not paying"])
def test_now_and_then_it_goes_the_other_way(time_s: float) -> None:
    request, speculation = repeating("a"), Speculation(1, 64, captured(r1=1.0, r2=time_s))
    plans = [bool(speculation.plan([request])) for _ in range(2 * TRIAL_EVERY)]
    assert plans.count(time_s > 5) == 2 * TRIAL_LENGTH
    assert plans[:100] == [time_s < 5] * 100


def test_a_crowd_leaves_no_room_and_is_not_even_read() -> None:
    requests = [new_request(str(i), 9) for i in range(5)]
    assert Speculation(3, 9).plan(requests) == {}
    assert all(request.drafter is None for request in requests)
    few = [repeating(str(i)) for i in range(3)]
    assert Eager(7, 16).plan(few) == {few[0]: 7, few[1]: 6}, "16 rows, 3 of which are no drafts"
    assert Speculation(7, 64, captured(r1=1.0, r2=1.0, r4=1.0)).plan(few[:1]) == {few[0]: 3}, (
        "none beyond what is captured"
    )


def test_who_may_not_or_need_not_draft() -> None:
    last = repeating("a", max_tokens=1)
    penalized = [
        repeating("c", repetition_penalty=1.1),
        repeating("d", presence_penalty=0.1),
        repeating("e", frequency_penalty=-0.1),
    ]
    for request in (last, repeating("b", matcher=Anything()), *penalized):
        assert Eager().plan([request]) == {}
    wanted = repeating("d", max_tokens=3)
    assert Eager().plan([wanted]) == {wanted: 2}


class Play:
    """A scheduler whose steps are run by hand. Requests answer 1, 2, 3, 1, 2 and so on, unless told otherwise."""

    def __init__(self, speculation: Speculation | None = None, num_blocks: int = 64, rows: int = 8) -> None:
        self.plan = Scheduler(
            num_blocks=num_blocks,
            block_size=4,
            max_num_requests=rows,
            max_batched_tokens=32,
            eos_ids=frozenset({EOS}),
            speculation=speculation,
        )
        self.time_s = 0.0

    def next(self) -> Step:
        step = self.plan.schedule(self.time_s)
        assert step is not None
        self.plan.check_integrity()
        return step

    def read(self, step: Step, *token_ids: int, **results: Any) -> list[tuple[int, Request]]:
        self.time_s += 1.0
        return self.plan.commit(step, StepResults(self.time_s, token_ids, **results))


def drafts_of(step: Step) -> list[int | None]:
    return [chunk.draft for chunk in step.chunks]


def begun(play: Play, *requests: Request) -> None:
    """Add requests and read their first token, 1."""
    for request in requests:
        play.plan.add(request)
    play.read(play.next(), *[1] * len(requests))


def test_drafts_follow_their_request_and_those_that_fit_are_taken() -> None:
    play, request = Play(Eager(3)), repeating("a")
    begun(play, request)
    step = play.next()
    assert drafts_of(step) == [None, 2, 3, 1]
    assert [(c.start, c.length, c.samples, c.index) for c in step.chunks] == [
        (12 + i, 1, True, 1 + i) for i in range(4)
    ]
    assert (step.num_requests, step.num_tokens, step.num_drafts, step.is_decode) == (1, 4, 3, True)
    assert play.read(step, 2, 3, 9, 1) == [(0, request), (1, request), (2, request)]
    assert request.output_ids == [1, 2, 3, 9], "the draft after 3 was 1, and what comes after it does not count"
    assert request.num_computed == request.num_tokens - 1 == 15
    assert (play.plan.num_draft_tokens, play.plan.num_accepted_tokens) == (3, 2)
    assert (request.num_steps, request.num_batch_rows) == (2, 2)
    assert drafts_of(play.next()) == [None], "3, 9 is new"


def test_no_draft_is_taken_behind_one_that_was_wrong_even_if_it_would_fit() -> None:
    play, request = Play(Eager(3)), repeating("a")
    begun(play, request)
    assert play.read(play.next(), 5, 3, 1, 2) == [(0, request)]
    assert request.output_ids == [1, 5]


@pytest.mark.parametrize(
    ("max_tokens", "sampled", "output", "reason"),
    [
        (9, (2, EOS, 1, 2), [1, 2, EOS], FinishReason.STOP),
        (4, (2, 3, 1), [1, 2, 3, 1], FinishReason.LENGTH),
        (2, (2,), [1, 2], FinishReason.LENGTH),
    ],
    ids=["end token", "length", "the last token"],
)
def test_an_end_amid_drafts_drops_the_rest(
    max_tokens: int, sampled: tuple[int, ...], output: list[int], reason: FinishReason
) -> None:
    play, request = Play(Eager(3)), repeating("a", max_tokens)
    begun(play, request)
    step = play.next()
    assert len(step.chunks) == len(sampled), "no draft beyond max_tokens"
    play.read(step, *sampled)
    assert (request.output_ids, request.finish_reason) == (output, reason)
    assert play.plan.is_idle
    assert play.plan.pool.num_free == 64


def test_a_fault_counts_only_where_a_draft_was_right() -> None:
    for place, output in ((3, [1, 2, 5]), (2, [1, 2, 5]), (1, [1, 2]), (0, [1])):
        play, request = Play(Eager(3)), repeating("a")
        begun(play, request)
        took = play.read(play.next(), 2, 5, 1, 2, faults={place: EngineFailed("why")})
        assert request.output_ids == output
        assert request.finish_reason == (FinishReason.ABORT if place < 2 else None)
        assert took[-1] == (min(place, 1), request)


def test_who_drafts_waits_for_its_tokens_and_all_wait_with_it() -> None:
    play, drafting, other = Play(Eager(3)), repeating("a"), new_request("b", 9, 50)
    begun(play, drafting, other)
    step = play.next()
    assert [(c.request.id, c.draft) for c in step.chunks] == [("a", None), ("a", 2), ("a", 3), ("a", 1), ("b", None)]
    assert play.plan.schedule(0.0) is None
    play.read(step, 2, 3, 1, 9, 4)
    assert [c.request.id for c in play.next().chunks] == ["a", "b"]


def test_a_prompt_is_read_at_once_and_nobody_drafts_beside_it() -> None:
    play, drafting, new = Play(Eager(3)), repeating("a"), new_request("b", 30, 50)
    begun(play, drafting)
    step = play.next()
    play.plan.add(new)
    beside = play.next()
    assert [c.request for c in beside.chunks] == [new], "the other waits for its tokens"
    play.read(step, 2, 3, 1, 9)
    assert [(c.request, c.draft) for c in play.next().chunks] == [(drafting, None), (new, None)], (
        "whose own is on its way"
    )


def test_while_nobody_drafts_steps_overlap_as_ever() -> None:
    with_it, without = Play(Speculation(3, 8)), Play()
    for play in (with_it, without):
        for i in range(3):
            play.plan.add(new_request(str(i), 5 + i, 12))
    unread, first_id = list[tuple[Step, Step]](), 0
    while not with_it.plan.is_idle:
        steps = with_it.plan.schedule(with_it.time_s), without.plan.schedule(without.time_s)
        told = [
            None if step is None else [(c.request.id, c.start, c.length, c.index) for c in step.chunks]
            for step in steps
        ]
        assert told[0] == told[1]
        if unread:
            first_id += 8
            for play, step in zip((with_it, without), unread.pop(0), strict=True):
                play.read(step, *range(first_id, first_id + sum(c.samples for c in step.chunks)))
        if steps[0] is not None and steps[1] is not None:
            unread.append((steps[0], steps[1]))
    assert with_it.plan.num_draft_tokens == 0


def test_drafts_that_do_not_pay_stop_and_steps_overlap_again() -> None:
    """Here a step takes a second for each of its rows."""
    play, request = Play(Speculation(3, 8)), repeating("a")
    begun(play, request)
    token = 1
    for _ in range(40):
        step = play.next()
        sampled = [(token + i) % 3 + 1 for i in range(len(step.chunks))]
        play.time_s += len(step.chunks) - 1
        play.read(step, *sampled)
        token = request.output_ids[-1]
    assert 0 < play.plan.num_draft_tokens <= 8, "each size once"
    first = play.next()
    second = play.plan.schedule(play.time_s)
    assert second is not None
    assert (first.num_drafts, second.num_drafts) == (0, 0)


def test_nobody_is_preempted_for_drafts() -> None:
    play = Play(Eager(3), num_blocks=9)
    first, second = repeating("a", length=15), repeating("b", length=15)
    begun(play, first, second)
    assert play.plan.pool.num_free == 1
    assert [(c.request, c.draft) for c in play.next().chunks] == [
        *((first, draft) for draft in (None, 2, 3, 1)),
        (second, None),
    ]
    assert (play.plan.num_preemptions, play.plan.pool.num_free) == (0, 0)


def test_a_key_is_charged_for_its_drafts_right_or_wrong() -> None:
    play = Play(Eager(3), rows=8)
    drafting, other = repeating("a", owner="anna"), new_request("b", 12, 100, owner="ben")
    begun(play, drafting, other)
    play.read(play.next(), 2, 3, 9, 1, 4)
    late = [new_request("a2", 4, owner="anna"), new_request("b2", 4, owner="ben")]
    for request in late:
        play.plan.add(request)
    # Else both keys would have gone, and an idle engine forgets who had more.
    for request in (drafting, other):
        play.plan.finish(request, FinishReason.ABORT, 0.0)
    play.next()
    assert play.plan.admitted == late[::-1], "anna had 3 tokens more than ben, who comes first though he asked later"


def test_what_was_accepted_of_a_request_that_has_been_preempted_meanwhile_counts() -> None:
    """It is computed again from its beginning."""
    play = Play(Eager(3), num_blocks=9)
    old, young, late = new_request("old", 14, 50), repeating("young"), new_request("late", 4)
    begun(play, old, young)
    step = play.next()
    assert [c.draft for c in step.chunks if c.request is young] == [None, 2, 3, 1]
    while young.row >= 0:
        play.plan._preempt(young)
    play.plan.add(late)
    play.read(step, 50, 2, 3, 9, 1)
    assert (young.output_ids, young.num_computed, young.num_pending) == ([1, 2, 3, 9], 0, 0)
    play.plan.finish(late, FinishReason.ABORT, 0.0)
    again = play.next()
    found = [(c.start, c.length, c.samples, c.index) for c in again.chunks if c.request is young]
    assert found == [(place, 1, place == 15, 4) for place in range(12, 16)], "12 were cached"


def test_several_tokens_of_a_step_reach_their_stream_and_the_step_counts_once() -> None:
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), PRESETS["w8a8"], torch.float32, CPU)
    engine = make_engine(decoder, speculation=Eager(3, 16))

    async def go() -> tuple[list[list[Token]], Progress]:
        stream = engine.submit([5, 6, 7, 8] * 6, SamplingParams(40, ignore_eos=True), "a")
        news = [tokens async for tokens in stream]
        return news, stream.progress

    try:
        news, progress = asyncio.run(go())
        stats = engine.stats()
    finally:
        engine.stop()
    assert sum(map(len, news)) == progress.num_generated == 40
    assert progress.batch_size_mean == 1.0
    assert progress.num_accepted == stats.num_accepted_tokens > 0
    assert stats.num_steps == 40 - stats.num_accepted_tokens < 40
    assert stats.step_batch_sizes[1] == stats.num_steps
    of_steps = [list(step) for _, step in groupby((token for tokens in news for token in tokens), lambda t: t.time_s)]
    assert len(of_steps) == stats.num_steps
    assert max(map(len, of_steps)) == 4


def test_a_client_adds_up_the_drafts_of_engines_that_died() -> None:
    async def refuse(*_: object) -> Any:
        raise AssertionError

    client = EngineClient("w8a8", lambda _: None, refuse, refuse, max_waiting=9)
    client.receive(News("w8a8", Gauges(num_draft_tokens=7, num_accepted_tokens=4)))
    client.lost(EngineFailed("gone"))
    client.receive(News("w8a8", Gauges(num_draft_tokens=2, num_accepted_tokens=1)))
    assert (client.stats().num_draft_tokens, client.stats().num_accepted_tokens) == (9, 5)
