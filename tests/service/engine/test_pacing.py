"""The token budget of a step, from measured times and from those of real steps."""

from __future__ import annotations

import pytest

from service.engine.pacing import MIN_CHUNK, MOST_TARGET_S, SLOWEST, TARGET_S, Pacing, default_target_s
from service.engine.scheduler import Scheduler, StepResults
from service.engine.shapes import Shape
from tests.support.requests import new_request

TIMES_S = {
    Shape(4, 4, is_decode=True): 0.004,
    Shape(128, 16): 0.005,
    Shape(256, 16): 0.007,
    Shape(256, 64): 0.009,
    Shape(512, 64): 0.012,
    Shape(1024, 64): 0.022,
}


def test_the_largest_step_within_the_target() -> None:
    for target_s, budget in ((0.005, 128), (0.0089, 128), (0.009, 256), (0.02, 512), (1.0, 1024)):
        assert Pacing(1024, target_s, TIMES_S).budget(num_decoding=3) == budget


def test_a_slow_model_has_a_longer_target() -> None:
    assert default_target_s({}) == TARGET_S
    assert default_target_s(TIMES_S) == TARGET_S
    slow = {shape: 2.5 * time_s for shape, time_s in TIMES_S.items()}
    assert default_target_s(slow) == pytest.approx(4 * 0.01)
    # With the usual one a step would read MIN_CHUNK tokens, whatever waits.
    assert Pacing(1024, TARGET_S, slow).budget(num_decoding=200) < Pacing(1024, 0.04, slow).budget(num_decoding=200)
    assert default_target_s({shape: 9 * time_s for shape, time_s in TIMES_S.items()}) == MOST_TARGET_S


def test_a_size_just_beyond_a_wave_of_tiles_is_passed_by() -> None:
    """Of steps that read about as many tokens a second the largest is taken, of others the fastest."""
    for slow_s, budget in ((0.0121, 640), (0.0125, 512)):
        times_s = {Shape(256, 16): 0.006, Shape(512, 16): 0.0095, Shape(640, 16): slow_s}
        assert Pacing(640, 0.02, times_s).budget(num_decoding=1) == budget
        assert Pacing(640, 0.02, times_s).budget(num_decoding=0) == budget


@pytest.mark.parametrize("pacing", [Pacing(900, None, TIMES_S), Pacing(900, 0.01), Pacing(900, 0.01, {})])
def test_without_target_or_times_any_step_may_be_full(pacing: Pacing) -> None:
    assert pacing.budget(num_decoding=3) == 900


def test_while_nobody_decodes_the_step_is_full() -> None:
    assert Pacing(1024, 0.006, TIMES_S).budget(num_decoding=0) == 1024


def test_prompts_go_on_however_tight_the_target() -> None:
    for num_decoding in (1, 200, 1000):
        budget = Pacing(1024, 0.001, TIMES_S).budget(num_decoding)
        assert budget == min(1024, num_decoding + MIN_CHUNK)


def test_real_steps_that_take_longer_make_the_next_ones_shorter() -> None:
    pacing = Pacing(1024, 0.025, TIMES_S)
    assert pacing.budget(1) == 1024
    for _ in range(60):
        pacing.observe(Shape(256, 16), 0.014)
    assert pacing.budget(1) == 512, "all take twice as long"
    for _ in range(60):
        pacing.observe(Shape(256, 16), 0.007)
    assert pacing.budget(1) == 1024
    pacing.observe(Shape(256, 16), 60.0)
    assert pacing._ratio < 1 + SLOWEST / 10, "a step that was held up says little of the next"
    pacing.observe(Shape(4, 4, is_decode=True), 1.0)
    pacing.observe(Shape(8192, 16), 1.0)
    assert pacing._ratio < 1 + SLOWEST / 10, "what was not measured is not compared"


def test_a_scheduler_splits_a_prompt_by_it_and_learns() -> None:
    plan = Scheduler(
        num_blocks=400,
        block_size=16,
        max_num_requests=4,
        max_batched_tokens=1024,
        target_itl_s=0.01,
        step_times_s=TIMES_S,
        has_prefix_cache=False,
    )
    first = new_request("a", 700, 50)
    plan.add(first)
    step = plan.schedule(0.0)
    assert step is not None
    assert step.num_tokens == 700, "nobody decodes yet"
    plan.commit(step, StepResults(0.0, [1], shape=Shape(1024, 64), device_s=0.022))
    plan.add(new_request("b", 700, 50))
    lengths = []
    while first.num_generated < 9:
        step = plan.schedule(0.0)
        assert step is not None
        lengths.append(step.num_tokens)
        samples = sum(chunk.samples for chunk in step.chunks)
        plan.commit(step, StepResults(0.0, [1] * samples, shape=Shape(256, 16), device_s=0.014))
    assert lengths[0] == 256
    assert min(length for length in lengths if length > 2) < 256, "steps took twice as long as measured"
    assert (plan.num_graph_steps, plan.num_plain_steps) == (len(lengths) + 1, 0)
    assert plan.num_padding_tokens == 1024 - 700 + sum(256 - length for length in lengths)
