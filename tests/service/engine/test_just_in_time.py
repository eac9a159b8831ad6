"""A step is planned just before the one that runs ends, so that requests that arrive meanwhile are in it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service.engine.api import SamplingParams
from service.engine.just_in_time import MOST_S, RESERVE_S, JustInTime
from service.engine.scheduler import StepResults
from service.engine.shapes import Shape
from service.errors import EngineFailed
from tests.service.kinds import StartEngine
from tests.support.engines import collect
from tests.support.scripted_runner import ScriptedRunner

SHAPE = Shape(8, 8, is_decode=True)


def knowing(*times_s: float) -> JustInTime:
    """A device whose steps took so long, the last of which ended at 1 s; another, launched before, runs since then."""
    known = JustInTime()
    known.launched(0.0, 0.0, was_late=False)
    for time_s in times_s:
        known.ended(StepResults(1.0, [], shape=SHAPE, device_s=time_s))
    return known


def test_the_next_step_waits_until_just_before_the_running_one_ends() -> None:
    known = knowing(0.004)
    assert known.wait_s(SHAPE, 1.0) == pytest.approx(0.004 - RESERVE_S)
    assert known.wait_s(SHAPE, 1.001) == pytest.approx(0.003 - RESERVE_S)
    assert known.wait_s(SHAPE, 1.1) == 0.0


@pytest.mark.parametrize("shape", [None, Shape(16, 16, is_decode=True)])
def test_a_step_whose_time_is_not_known_keeps_nobody(shape: Shape | None) -> None:
    assert knowing(0.004).wait_s(shape, 1.0) == 0.0


def test_launching_takes_time_too() -> None:
    known = knowing(0.004)
    known.launched(1.001, 0.001, was_late=False)
    known.ended(StepResults(2.0, [], shape=SHAPE, device_s=0.004))
    assert known.wait_s(SHAPE, 2.0) == pytest.approx(0.003 - RESERVE_S)
    # The longest counts, less and less.
    for _ in range(200):
        known.launched(2.0, 0.0, was_late=False)
    assert known.wait_s(SHAPE, 2.0) == pytest.approx(0.004 - RESERVE_S, abs=5e-5)


def test_a_shorter_step_is_believed_at_once_and_a_longer_one_slowly() -> None:
    assert knowing(0.004, 0.002).wait_s(SHAPE, 1.0) == pytest.approx(0.002 - RESERVE_S)
    assert knowing(0.002, 0.004).wait_s(SHAPE, 1.0) == pytest.approx(0.0022 - RESERVE_S)
    assert knowing(0.002, *[0.004] * 60).wait_s(SHAPE, 1.0) == pytest.approx(0.004 - RESERVE_S, abs=1e-5)


def test_being_late_is_answered_by_more_reserve() -> None:
    known = knowing(0.1)
    for count in range(1, 9):
        known.launched(1.0, 0.0, was_late=True)
        assert known.wait_s(SHAPE, 1.0) == pytest.approx(0.1 - min(MOST_S, RESERVE_S * 2**count))
    for _ in range(400):
        known.launched(1.0, 0.0, was_late=False)
    assert known.wait_s(SHAPE, 1.0) == pytest.approx(0.1 - RESERVE_S)


def test_being_late_on_another_rank_is_answered_as_well() -> None:
    known = knowing(0.1)
    for count in range(1, 4):
        known.was_late()
        assert known.num_late == count
        assert known.wait_s(SHAPE, 1.0) == pytest.approx(0.1 - RESERVE_S * 2**count)


class Held(JustInTime):
    """Holds the planning of the third step for a minute, or until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.num_launched = 0
        self.is_held, self.release = threading.Event(), threading.Event()

    def launched(self, now_s: float, launch_s: float, *, was_late: bool) -> None:
        self.num_launched += 1
        super().launched(now_s, launch_s, was_late=was_late)

    def wait_s(self, shape: Shape | None, now_s: float) -> float:
        if self.num_launched != 2 or self.release.is_set():
            return 0.0
        self.is_held.set()
        return 60.0


def test_a_request_that_comes_while_a_step_runs_is_in_the_next_one(engine_of: StartEngine) -> None:
    engine = engine_of(ScriptedRunner())
    engine._just_in_time = held = Held()
    params = SamplingParams(max_tokens=6, ignore_eos=True)

    async def second_beside_first() -> list[list[int]]:
        first = asyncio.create_task(collect(engine, [1, 2, 3], params))
        await asyncio.to_thread(held.is_held.wait, 60)
        second = asyncio.create_task(collect(engine, [4, 5, 6], params))
        await asyncio.sleep(0)  # it is submitted
        held.release.set()
        return [[token.id for token in tokens] for tokens in await asyncio.gather(first, second)]

    assert asyncio.run(second_beside_first()) == [list(range(6))] * 2
    # Two steps of the first alone, four of both, and two of the second alone.
    assert engine.stats().step_batch_sizes[:3] == (0, 4, 4)


def test_a_step_that_ends_early_is_not_waited_for(engine_of: StartEngine) -> None:
    runner = ScriptedRunner()
    runner.is_done = True
    engine = engine_of(runner)
    engine._just_in_time = Held()
    answer = collect(engine, [1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True))
    assert [token.id for token in asyncio.run(asyncio.wait_for(answer, 30))] == list(range(6))


def test_what_waits_for_the_end_of_a_step_can_be_stopped(engine_of: StartEngine) -> None:
    engine = engine_of(ScriptedRunner())
    engine._just_in_time = held = Held()

    async def stopped() -> None:
        answer = asyncio.create_task(collect(engine, [1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True)))
        await asyncio.to_thread(held.is_held.wait, 60)
        await asyncio.to_thread(engine.stop, 30.0)
        with pytest.raises(EngineFailed, match="is stopping"):
            await answer

    asyncio.run(stopped())
    assert not engine.is_alive


def test_new_weights_have_times_of_their_own(engine_of: StartEngine) -> None:
    engine = engine_of(ScriptedRunner())
    before = engine._just_in_time
    before.num_late = 7
    engine.exchange(ScriptedRunner(), num_blocks=64, weight_bytes=0, wait_s=10.0).result(30)
    assert engine._just_in_time is not before
    assert engine.stats().num_late_steps == 7


@pytest.mark.parametrize(("is_done", "others_late", "num_late"), [(1, 0, 5), (0, 1, 6), (1, 1, 6), (0, 0, 0)])
def test_steps_that_came_late_are_counted_once(
    engine_of: StartEngine, is_done: int, others_late: int, num_late: int
) -> None:
    runner = ScriptedRunner()
    runner.is_done, runner.others_late = bool(is_done), bool(others_late)
    engine = engine_of(runner)
    asyncio.run(collect(engine, [1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True)))
    assert engine.stats().num_steps == 6
    # Before the first of them none ran here.
    assert engine.stats().num_late_steps == num_late
