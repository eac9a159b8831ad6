"""Blocks shared by prompts that begin alike: who finds what, who may not, and that no request ever reads other keys.

Requests that draft share blocks too: no wrong draft may leave a key where another token's is looked for.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engine.api import FinishReason, SamplingParams
from service.engine.blocks import BlockPool
from service.engine.drafts.speculation import Speculation
from service.engine.request import Request
from service.engine.scheduler import Chunk, Scheduler, Step, StepResults
from tests.support.eager import Eager

BLOCK_SIZE = 4


def request_of(
    name: str,
    prompt_ids: list[int],
    max_tokens: int = 4,
    salt: str = "",
    max_cached: int | None = None,
    prompt_logprobs: int | None = None,
) -> Request:
    params = SamplingParams(
        max_tokens, ignore_eos=True, prompt_logprobs=prompt_logprobs, salt=salt, max_cached=max_cached
    )
    return Request(name, prompt_ids, params, 0.0, 0)


def scheduler(
    num_blocks: int = 64,
    rows: int = 8,
    budget: int = 64,
    has_prefix_cache: bool = True,
    speculation: Speculation | None = None,
) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_requests=rows,
        max_batched_tokens=budget,
        has_prefix_cache=has_prefix_cache,
        speculation=speculation,
    )


class Keys:
    """A cache whose keys tell the text that they were computed from: the hash of all tokens up to their own."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}

    def run(self, step: Step) -> StepResults:
        """Write the step's keys, check that every row sees those of its own text, and sample from the text."""
        all_texts = [
            self.texts(chunk.request, chunk.start + chunk.length, _drafts(step, chunk)) for chunk in step.chunks
        ]
        for chunk, texts in zip(step.chunks, all_texts, strict=True):
            for position in range(chunk.start, chunk.start + chunk.length):
                self.slots[self.slot(chunk.request, position)] = texts[position]
        sampled = []
        for chunk, texts in zip(step.chunks, all_texts, strict=True):
            seen = [self.slots.get(self.slot(chunk.request, position)) for position in range(len(texts))]
            assert seen == texts, f"{chunk.request.id} sees keys of another text"
            if chunk.samples:
                sampled.append(next_token(texts[-1]))
        return StepResults(0.0, sampled)

    @staticmethod
    def texts(request: Request, num_tokens: int, drafts: Sequence[int] = ()) -> list[int]:
        """The key of each of its first tokens. Tokens that the host has not read follow from those before."""
        ids = [*request.prompt_ids, *request.output_ids, *drafts][:num_tokens]
        texts = list(accumulate(ids, lambda text, token: hash((text, token)), initial=0))[1:]
        while len(texts) < num_tokens:
            texts.append(hash((texts[-1], next_token(texts[-1]))))
        return texts

    @staticmethod
    def slot(request: Request, position: int) -> int:
        return request.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def _drafts(step: Step, chunk: Chunk) -> list[int]:
    """The draft tokens of a chunk's request up to the chunk's own."""
    own = (each for each in step.chunks if each.request is chunk.request and each.start <= chunk.start)
    return [each.draft for each in own if each.draft is not None]


def next_token(text: int) -> int:
    return text % 5


def answer_to(prompt_ids: list[int], num_tokens: int) -> list[int]:
    text, answer = Keys.texts(request_of("", prompt_ids), len(prompt_ids))[-1], []
    for _ in range(num_tokens):
        answer.append(next_token(text))
        text = hash((text, answer[-1]))
    return answer


def finish(plan: Scheduler, *requests: Request, keys: Keys | None = None) -> list[int]:
    """Run requests to their end, one step at a time. Returns the tokens of each step."""
    keys, lengths = keys or Keys(), []
    for request in requests:
        plan.add(request)
    while (step := plan.schedule(0.0)) is not None:
        lengths.append(step.num_tokens)
        plan.commit(step, keys.run(step))
    plan.check_integrity()
    return lengths


def test_a_prompt_that_begins_alike_computes_only_its_rest() -> None:
    plan, keys = scheduler(), Keys()
    begin = list(range(100, 121))
    assert finish(plan, request_of("a", begin, 1), keys=keys) == [21]
    other = request_of("b", [*begin[:18], 5, 5, 5, 5], 1)
    assert finish(plan, other, keys=keys) == [22 - 16]
    assert other.num_cached == 16
    assert other.output_ids == answer_to(other.prompt_ids, 1)


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 0), (6, 4), (8, 4), (9, 4), (10, 8), (21, 16)])
def test_the_last_two_tokens_are_always_computed(length: int, cached: int) -> None:
    plan, keys = scheduler(), Keys()
    begin = list(range(100, 140))
    finish(plan, request_of("a", begin, 1), keys=keys)
    again = request_of("b", begin[:length], 1)
    finish(plan, again, keys=keys)
    assert again.num_cached == cached


def test_an_answer_is_found_by_the_next_turn() -> None:
    plan, keys = scheduler(), Keys()
    first = request_of("a", [1, 2, 3, 4, 5], 10)
    finish(plan, first, keys=keys)
    turn = request_of("b", [*first.prompt_ids, *first.output_ids, 9, 9, 9], 2)
    finish(plan, turn, keys=keys)
    assert turn.num_cached == 12, "all full blocks whose keys were computed"
    assert turn.output_ids == answer_to(turn.prompt_ids, 2)


def test_requests_that_run_share_blocks() -> None:
    plan, keys = scheduler(), Keys()
    prompt = list(range(100, 122))
    plan.add(request_of("a", prompt, 30))
    for _ in range(2):
        step = plan.schedule(0.0)
        assert step is not None
        plan.commit(step, keys.run(step))
    used = plan.pool.num_blocks - plan.pool.num_free
    late = request_of("b", prompt, 3)
    plan.add(late)
    step = plan.schedule(0.0)
    assert step is not None
    assert late.blocks[:5] == plan.running[0].blocks[:5]
    assert plan.pool.num_blocks - plan.pool.num_free == used + 1
    plan.commit(step, keys.run(step))
    finish(plan, keys=keys)


def test_another_salt_finds_nothing() -> None:
    plan, keys = scheduler(), Keys()
    prompt = list(range(100, 120))
    finish(plan, request_of("a", prompt, 1, salt="ann"), keys=keys)
    for salt, cached in (("", 0), ("bob", 0), ("ann", 16)):
        request = request_of("b", prompt, 1, salt=salt)
        finish(plan, request, keys=keys)
        assert request.num_cached == cached, salt
    assert (plan.num_cached(prompt, "ann"), plan.num_cached(prompt, "eve")) == (16, 0)


def test_who_wants_less_gets_less() -> None:
    plan, keys = scheduler(), Keys()
    prompt = list(range(100, 120))
    finish(plan, request_of("a", prompt, 1), keys=keys)
    for max_cached, cached in ((0, 0), (3, 0), (4, 4), (11, 8), (100, 16)):
        request = request_of("b", prompt, 1, max_cached=max_cached)
        finish(plan, request, keys=keys)
        assert request.num_cached == cached


def test_who_wants_log_probabilities_of_the_prompt_computes_all_of_it() -> None:
    plan, keys = scheduler(), Keys()
    prompt = list(range(100, 120))
    finish(plan, request_of("a", prompt, 1), keys=keys)
    request = request_of("b", prompt, 1, prompt_logprobs=0)
    assert finish(plan, request, keys=keys) == [20]
    assert request.num_cached == 0


def test_it_can_be_switched_off() -> None:
    plan, keys = scheduler(has_prefix_cache=False), Keys()
    prompt = list(range(100, 120))
    assert finish(plan, request_of("a", prompt, 1), request_of("b", prompt, 1), keys=keys) == [40]
    assert finish(plan, request_of("c", prompt, 1), keys=keys) == [20]


def test_a_fault_leaves_nothing_to_find() -> None:
    """Keys that made a row not finite are not given to others; nor is anything after a step that failed."""
    plan, keys = scheduler(), Keys()
    prompt = list(range(100, 120))
    plan.add(request_of("a", prompt, 9))
    step = plan.schedule(0.0)
    assert step is not None
    plan.commit(step, StepResults(0.0, [0], faults={0: ValueError()}))
    plan.check_integrity()
    assert plan.num_cached(prompt, "") == 0
    finish(plan, request_of("b", prompt, 1), keys=keys)
    assert plan.num_cached(prompt, "") == 16
    plan.pool.forget_all()
    plan.check_integrity()
    assert plan.num_cached(prompt, "") == 0


def test_the_ends_of_what_was_used_longest_ago_go_first() -> None:
    pool = BlockPool(4)
    old, young = pool.allocate(2), pool.allocate(2)
    for salt, blocks in (("old", old), ("young", young)):
        key = pool.remember(salt, [1, 2], blocks[0])
        pool.remember(key, [3, 4], blocks[1])
    first, last = old
    pool.release(old)
    pool.release(young)
    assert pool.num_free == 4
    assert pool.allocate(1) == [last]
    assert [block for block, _ in pool.find("old", [1, 2, 3, 4], 2)] == [first]
    assert len(pool.find("young", [1, 2, 3, 4], 2)) == 2
    pool.check_integrity([last])


def test_a_preempted_request_finds_its_own_blocks() -> None:
    plan, keys = scheduler(num_blocks=10), Keys()
    requests = [request_of(name, [start + i for i in range(9)], 16) for name, start in (("a", 100), ("b", 200))]
    lengths = finish(plan, *requests, keys=keys)
    assert plan.num_preemptions > 0
    assert [request.output_ids for request in requests] == [answer_to(request.prompt_ids, 16) for request in requests]
    assert all(request.num_cached == 0 for request in requests), "told of what was there on arrival"
    assert sum(lengths) < 2 * (9 + 16) + 16, "not all is computed again"


class Traffic(RuleBasedStateMachine):
    """Requests with common beginnings arrive, end early, are preempted and fail; steps are read one step late.

    `Keys` asserts at every step that each row sees the keys of its own text.
    """

    has_drafts = False

    def __init__(self) -> None:
        super().__init__()
        speculation = Eager(max_rows=4) if self.has_drafts else None
        self.plan = scheduler(num_blocks=14, rows=4, budget=11, speculation=speculation)
        self.keys = Keys()
        self.unread: deque[tuple[Step, StepResults]] = deque()
        self.requests: list[Request] = []

    @rule(
        begin=st.integers(0, 2),
        length=st.integers(1, 24),
        rest=st.lists(st.integers(0, 4), max_size=3),
        max_tokens=st.integers(1, 12),
        salt=st.sampled_from(["", "", "ann"]),
        max_cached=st.sampled_from([None, None, 8]),
    )
    def arrive(
        self, begin: int, length: int, rest: list[int], max_tokens: int, salt: str, max_cached: int | None
    ) -> None:
        prompt = [(begin * 3 + i) % 5 for i in range(length)] + rest
        request = request_of(str(len(self.requests)), prompt, max_tokens, salt, max_cached)
        self.requests.append(request)
        self.plan.add(request)

    @rule(late=st.booleans())
    def step(self, late: bool) -> None:
        step = self.plan.schedule(0.0)
        if step is not None:
            self.unread.append((step, self.keys.run(step)))
        while len(self.unread) > (1 if late and step is not None else 0):
            self.plan.commit(*self.unread.popleft())

    @precondition(lambda self: self.plan.running or self.plan.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([*self.plan.running, *self.plan.waiting]))
        self.plan.finish(request, FinishReason.ABORT, 0.0)

    @precondition(lambda self: not self.unread)
    @rule()
    def fail(self) -> None:
        for request in list(self.plan.running):
            self.plan.finish(request, FinishReason.ABORT, 0.0)
        self.plan.pool.forget_all()
        self.keys.slots.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        self.plan.check_integrity()

    def teardown(self) -> None:
        for _ in range(2000):
            if self.plan.is_idle and not self.unread:
                break
            self.step(late=True)
        assert self.plan.is_idle
        assert self.plan.pool.num_free == self.plan.pool.num_blocks
        for request in self.requests:
            expected = answer_to(request.prompt_ids, len(request.output_ids))
            assert request.output_ids == expected
            if request.finish_reason == FinishReason.LENGTH:
                assert len(request.output_ids) == request.params.max_tokens


Traffic.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestTraffic = Traffic.TestCase


class DraftingTraffic(Traffic):
    """The same with drafts, most of which are wrong."""

    has_drafts = True


DraftingTraffic.TestCase.settings = Traffic.TestCase.settings
TestDraftingTraffic = DraftingTraffic.TestCase


@pytest.mark.parametrize("has_drafts", [False, True], ids=["", "drafts"])
def test_ten_thousand_requests_leave_nothing_behind(has_drafts: bool) -> None:
    """With random ends, common beginnings, and less memory than they want."""
    rng, keys = random.Random(0), Keys()
    plan = scheduler(num_blocks=40, rows=8, budget=48, speculation=Eager(max_rows=8) if has_drafts else None)
    unread: deque[tuple[Step, StepResults]] = deque()
    num_hits, num_arrived = 0, 0
    while num_arrived < 10_000 or not plan.is_idle or unread:
        # Prompts that wait leave no room for drafts, so at times none do.
        while num_arrived < 10_000 and len(plan.waiting) < 4 and (not has_drafts or rng.random() < 0.2):
            prompt = (
                [rng.randrange(3)] * 4 + [rng.randrange(2)] * 8 + [rng.randrange(5) for _ in range(rng.randrange(9))]
            )
            plan.add(request_of(str(num_arrived), prompt, rng.randint(1, 12 if has_drafts else 6)))
            num_arrived += 1
        if plan.running and rng.random() < 0.1:
            plan.finish(rng.choice(plan.running), FinishReason.ABORT, 0.0)
        step = plan.schedule(0.0)
        num_hits += sum(request.num_cached > 0 for request in plan.admitted)
        if step is not None:
            unread.append((step, keys.run(step)))
        while len(unread) > (step is not None):
            plan.commit(*unread.popleft())
    plan.check_integrity()
    assert plan.pool.num_free == 40
    assert num_hits > 5000
    if has_drafts:
        assert 300 < plan.num_accepted_tokens < plan.num_draft_tokens / 2
    assert len(plan.pool._content) == len(plan.pool._found) <= 40


def test_a_request_without_room_is_looked_up_again_only_when_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, keys = scheduler(num_blocks=20), Keys()
    find, lookups = plan.pool.find, list[str]()

    def noted(salt: str, token_ids: Sequence[int], block_size: int) -> list[tuple[int, int]]:
        lookups.append(salt)
        return find(salt, token_ids, block_size)

    monkeypatch.setattr(plan.pool, "find", noted)
    plan.add(request_of("a", list(range(100, 130)), 30))
    step = plan.schedule(0.0)
    assert step is not None
    plan.commit(step, keys.run(step))
    plan.add(request_of("b", list(range(200, 270)), 2))
    lookups.clear()
    while plan.running and plan.running[0].id == "a":
        step = plan.schedule(0.0)
        assert step is not None
        plan.commit(step, keys.run(step))
    assert len(lookups) == 1
    finish(plan, keys=keys)


def test_keys_of_a_prompt_are_found_once_its_last_row_was_finite() -> None:
    """Of a prompt that ends before, nobody knows whether they are."""
    plan, keys = scheduler(budget=8), Keys()
    prompt = list(range(100, 130))
    request = request_of("a", prompt, 3)
    plan.add(request)
    for _ in range(2):
        step = plan.schedule(0.0)
        assert step is not None
        plan.commit(step, keys.run(step))
    assert plan.num_cached(prompt, "") == 0
    plan.finish(request, FinishReason.ABORT, 0.0)
    assert plan.num_cached(prompt, "") == 0
    finish(plan, request_of("b", prompt, 1), keys=keys)
    assert plan.num_cached(prompt, "") == 28
