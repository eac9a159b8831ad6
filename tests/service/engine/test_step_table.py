"""The numbers of a step against a plain reference, over steps as a scheduler makes them."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest

from service.engine.api import FinishReason
from service.engine.drafts.speculation import Speculation
from service.engine.scheduler import Scheduler, Step, StepResults
from service.engine.shapes import Shape
from service.engine.step_table import StepTable, StepTableBuilder, TableLayout
from tests.support.eager import Eager
from tests.support.requests import new_request

BLOCK_SIZE = 4
MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS = 24, 6, 16
LAYOUT = TableLayout(max_tokens=MAX_TOKENS, max_requests=MAX_REQUESTS, max_blocks=MAX_BLOCKS)
COLUMNS = (
    "token_ids",
    "from_row",
    "positions",
    "slots",
    "query_starts",
    "context_lens",
    "sample_index",
    "sample_rows",
)


def expected_columns(step: Step, shape: Shape | None = None) -> dict[str, list[int]]:
    """Token by token."""
    columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
    columns["query_starts"].append(0)
    for chunk in step.chunks:
        request = chunk.request
        known = dict(enumerate(request.prompt_ids + request.output_ids))
        if chunk.draft is not None:
            known[chunk.start] = chunk.draft
        for position in range(chunk.start, chunk.start + chunk.length):
            columns["token_ids"].append(known.get(position, 0))
            columns["from_row"].append(-1 if position in known else request.row)
            columns["positions"].append(position)
            columns["slots"].append(request.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        columns["query_starts"].append(len(columns["token_ids"]))
        columns["context_lens"].append(chunk.start + chunk.length)
        if chunk.samples:
            columns["sample_index"].append(len(columns["token_ids"]) - 1)
            columns["sample_rows"].append(request.row)
    if shape is not None:
        per_token = {"token_ids": 0, "from_row": -1, "positions": 0, "slots": -1}
        per_request = {"context_lens": 0, "sample_index": 0, "sample_rows": MAX_REQUESTS}
        for name, value in per_token.items():
            columns[name] += [value] * (shape.num_tokens - step.num_tokens)
        for name, value in per_request.items():
            columns[name] += [value] * (shape.num_requests - len(columns[name]))
        columns["query_starts"] += [step.num_tokens] * (shape.num_requests - len(step.chunks))
    return columns


def poisoned() -> npt.NDArray[np.int32]:
    return np.full(LAYOUT.size, -77, dtype=np.int32)


def check(step: Step, table: StepTable, shape: Shape | None = None) -> None:
    for name, values in expected_columns(step, shape).items():
        assert getattr(table, name).tolist() == values, name
    assert table.is_decode == (shape.is_decode if shape else step.is_decode)
    if table.is_decode and not step.num_drafts:
        assert step.num_requests == len(step.chunks), "kernels read keys before the step has written any"
    owned = [chunk.request.blocks for chunk in step.chunks]
    assert table.block_tables.shape == (len(owned), max(map(len, owned)))
    for row, blocks in zip(table.block_tables.tolist(), owned, strict=True):
        assert row[: len(blocks)] == blocks


def plan_of(num_blocks: int = 200, speculation: Speculation | None = None) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_requests=MAX_REQUESTS,
        max_batched_tokens=MAX_TOKENS,
        speculation=speculation,
    )


def planned(plan: Scheduler) -> Step:
    """The next step, where there must be one."""
    step = plan.schedule(0.0)
    assert step is not None
    return step


def commit(plan: Scheduler, step: Step, rng: random.Random, num_ids: int = 1000) -> None:
    plan.commit(step, StepResults(0.0, [rng.randrange(num_ids) for chunk in step.chunks if chunk.samples]))


@pytest.mark.parametrize("num_in_flight", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize("num_blocks", [200, 20], ids=["roomy", "preempting"])
@pytest.mark.parametrize("has_drafts", [False, True], ids=["", "drafts"])
def test_random_steps(num_blocks: int, num_in_flight: int, has_drafts: bool) -> None:
    """Mixtures of prompts in chunks and decodes, rows that change hands, preemption, aborts, a step in flight."""
    kinds, lone, num_preemptions, num_drafts, num_ids = set(), set(), 0, 0, 3 if has_drafts else 1000
    for seed in range(12):
        rng, builder = random.Random(seed), StepTableBuilder(LAYOUT, BLOCK_SIZE)
        plan = plan_of(num_blocks, Eager(2, MAX_REQUESTS) if has_drafts else None)
        requests = [new_request(str(i), rng.randint(1, 40), rng.randint(1, 20)) for i in range(14)]
        arrivals = list(requests)
        in_flight: list[Step] = []
        while arrivals or not plan.is_idle or in_flight:
            for _ in range(rng.choice([0, 0, 1, 3])):
                if arrivals:
                    plan.add(arrivals.pop())
            if plan.running and rng.random() < 0.03:
                plan.finish(rng.choice(plan.running), FinishReason.ABORT, 0.0)
            step = plan.schedule(0.0)
            if step is not None:
                kinds.add((step.is_decode, len({chunk.length for chunk in step.chunks}) > 1))
                num_requests = len(step.chunks)
                if num_requests == 1:
                    (chunk,) = step.chunks
                    lone.add((step.is_decode, chunk.samples, chunk.start > 0))
                shapes = [None, Shape(step.num_tokens, num_requests), Shape(MAX_TOKENS, MAX_REQUESTS)]
                if step.is_decode:
                    shapes += [Shape(count, count, is_decode=True) for count in (num_requests, MAX_REQUESTS)]
                for shape in shapes:
                    check(step, builder.build(step, poisoned(), shape), shape)
                in_flight.append(step)
            if in_flight and (len(in_flight) > num_in_flight or step is None):
                commit(plan, in_flight.pop(0), rng, num_ids)
        num_preemptions += plan.num_preemptions
        num_drafts += plan.num_draft_tokens
    assert kinds == {(True, False), (False, False), (False, True)}
    prompts = {(False, True, False), (False, False, False), (False, True, True)}
    assert lone >= {*prompts, (True, True, True)}, "a step of one chunk is built in a way of its own"
    assert (num_drafts > 50) == has_drafts
    assert (num_preemptions > 0) == (num_blocks == 20)


def test_one_array_holds_all_and_nothing_is_written_behind_it() -> None:
    plan, numbers = plan_of(), poisoned()
    for i in range(3):
        plan.add(new_request(str(i), 5))
    table = StepTableBuilder(LAYOUT, BLOCK_SIZE).build(planned(plan), numbers)
    assert all(np.shares_memory(getattr(table, name), numbers) for name in (*COLUMNS, "block_tables", "numbers"))
    assert len(table.numbers) == LAYOUT.starts["block_tables"] + 3 * 2
    assert (numbers[len(table.numbers) :] == -77).all()
    assert numbers.dtype == table.slots.dtype == np.int32


def test_columns_begin_at_multiples_of_16_bytes() -> None:
    layout = TableLayout(max_tokens=13, max_requests=5, max_blocks=3)
    assert all(4 * start % 16 == 0 for start in layout.starts.values())
    assert layout.size >= 4 * 13 + 3 * 5 + 6 + 5 * 3


def test_the_largest_step_fits() -> None:
    plan = plan_of()
    for i in range(MAX_REQUESTS):
        plan.add(new_request(str(i), MAX_TOKENS // MAX_REQUESTS))
    step = planned(plan)
    assert (step.num_tokens, len(step.chunks)) == (MAX_TOKENS, MAX_REQUESTS)
    check(step, StepTableBuilder(LAYOUT, BLOCK_SIZE).build(step, poisoned()))


def test_blocks_are_learnt_anew_after_a_preemption() -> None:
    """The same request in the same row, with as many blocks as before, but others."""
    plan, rng, builder = plan_of(), random.Random(0), StepTableBuilder(LAYOUT, BLOCK_SIZE)
    request = new_request("a", 9, 8)
    plan.add(request)
    step = planned(plan)
    before = builder.build(step, poisoned()).block_tables.tolist()
    commit(plan, step, rng)
    row = request.row
    plan._preempt(request)
    plan.pool.allocate(2)
    step = planned(plan)
    after = builder.build(step, poisoned()).block_tables.tolist()
    assert request.row == row
    assert [(chunk.start, chunk.length) for chunk in step.chunks] == [(4, 5), (9, 1)]
    assert len(after[0]) == len(before[0])
    assert after == [request.blocks, request.blocks] != before * 2
    check(step, builder.build(step, poisoned()))


def test_a_row_that_changes_hands_brings_the_blocks_of_its_new_owner() -> None:
    plan, rng, builder = plan_of(), random.Random(0), StepTableBuilder(LAYOUT, BLOCK_SIZE)
    for name in ("a", "b"):
        plan.add(new_request(name, 9, 1))
        step = planned(plan)
        check(step, builder.build(step, poisoned()))
        commit(plan, step, rng)
        plan.pool.allocate(1)


def test_answers_that_are_computed_again_are_no_decode() -> None:
    """Tokens of one request, each in a chunk of its own, as after a preemption: they read each other's keys."""
    plan = plan_of(num_blocks=6)
    for name in "ab":
        plan.add(new_request(name, 4, 20))
    rng, builder, seen = random.Random(0), StepTableBuilder(LAYOUT, BLOCK_SIZE), 0
    while (step := plan.schedule(0.0)) is not None:
        seen += step.num_requests < len(step.chunks) == step.num_tokens
        check(step, builder.build(step, poisoned()))
        commit(plan, step, rng)
    assert plan.num_preemptions
    assert seen
