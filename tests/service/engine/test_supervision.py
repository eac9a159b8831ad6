"""Steps that raise, steps that do not end, and requests that fail alone: who is told, what is freed, what goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from service.engine.api import SamplingParams
from service.engine.device.device_thread import DeviceThread
from service.engine.inbox import Inbox
from service.engine.loop import EngineLoop
from service.engine.masks import Masks
from service.engine.messages import News, Submit
from service.engine.scheduler import Scheduler, Step
from service.engine.stream import RequestStream
from service.engine.supervision import FaultLimits, InHand, Restarts, StepStuck, is_poison
from service.errors import Draining, EngineFailed
from tests.service.kinds import StartEngine
from tests.support.faulty_engines import BOTH, EITHER, FAULT, assert_empty, outcome, run_all
from tests.support.harness import DEADLINE_S
from tests.support.scripted_runner import Hang, ScriptedRunner, raising


@BOTH
@EITHER
def test_a_step_that_raises_fails_the_running_and_keeps_the_waiting(
    engine_of: StartEngine, is_async: bool, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    runner = ScriptedRunner(is_async)
    setattr(runner, where, raising(FAULT, 5))
    engine = engine_of(runner)
    results = run_all(engine, [20] * 10)
    failed = [i for i, result in enumerate(results) if isinstance(result, EngineFailed)]
    assert failed == [0, 1, 2, 3]
    lost = results[0]
    assert isinstance(lost, EngineFailed)
    assert "raised RuntimeError" in lost.message
    assert "kernel" not in lost.message
    assert "send the request again" in lost.message
    assert results[4:] == [list(range(20))] * 6
    assert engine.failure is None
    assert engine.stats().num_restarts == 1
    assert_empty(engine)
    assert any(record.exc_info[1] is FAULT for record in caplog.records if record.exc_info)


def test_blocks_are_checked_at_rest_alone(engine_of: StartEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check takes milliseconds, so a request that comes right after another must not wait for it."""
    checks: list[float] = []
    monkeypatch.setattr(Scheduler, "check_integrity", lambda _: checks.append(time.perf_counter()))
    monkeypatch.setattr("service.engine.loop.CHECK_AFTER_S", 3600.0)
    engine = engine_of(ScriptedRunner())
    for _ in range(3):
        run_all(engine, [2])
    assert not checks
    monkeypatch.setattr("service.engine.loop.CHECK_AFTER_S", 0.05)
    run_all(engine, [2])
    deadline_s = time.perf_counter() + DEADLINE_S
    while not checks and time.perf_counter() < deadline_s:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(checks) == 1


def test_what_the_step_in_flight_brought_is_not_lost(engine_of: StartEngine, caplog: pytest.LogCaptureFixture) -> None:
    """Of two requests the first has its last token in the step before the one that raises."""
    runner = ScriptedRunner()
    runner.on_execute = raising(FAULT, 6)
    results = run_all(engine_of(runner), [6, 20])
    assert results[0] == list(range(6))
    assert isinstance(results[1], EngineFailed)


def test_a_result_after_a_lost_one_is_not_mistaken_for_it(
    engine_of: StartEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Reading step 5 raises while step 6 is in flight: token 6 must not be published as token 5."""
    runner = ScriptedRunner()
    runner.on_read = raising(FAULT, 5)
    engine = engine_of(runner)
    seen: list[int] = []

    async def go() -> list[int] | EngineFailed:
        stream = engine.submit([1], SamplingParams(max_tokens=20), "r")
        assert isinstance(await outcome(stream, seen), EngineFailed)
        return await outcome(engine.submit([1], SamplingParams(max_tokens=3), "next"))

    assert asyncio.run(go()) == [0, 1, 2]
    assert seen == [0, 1, 2, 3, 4]


@BOTH
def test_preempted_requests_outlive_a_fault_and_answer_right(
    engine_of: StartEngine, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks for two requests of eight: whoever is put back when the step raises is computed again."""
    runner = ScriptedRunner(is_async)
    runner.on_execute = raising(FAULT, 9)
    engine = engine_of(runner, rows=8, num_blocks=12)
    results = run_all(engine, [20] * 8)
    assert engine.stats().num_preemptions > 0
    lost = [result for result in results if isinstance(result, EngineFailed)]
    assert 0 < len(lost) < 8
    assert [result for result in results if not isinstance(result, EngineFailed)] == [list(range(20))] * (8 - len(lost))
    assert_empty(engine)


@BOTH
@EITHER
def test_one_fault_too_many_fails_everyone_and_for_good(
    engine_of: StartEngine, is_async: bool, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    runner = ScriptedRunner(is_async)
    setattr(runner, where, raising(FAULT, *range(100)))
    engine = engine_of(runner, rows=2, max_restarts=2)
    results = run_all(engine, [5] * 10)
    lost = [result for result in results if isinstance(result, EngineFailed)]
    assert lost == results
    assert sum("raised RuntimeError" in result.message for result in lost) == 4
    assert sum(result.message == "the engine of variant 'w8a8' failed: RuntimeError" for result in lost) == 6
    assert engine.failed.result() is FAULT
    assert engine.stats().num_restarts == 2
    assert_empty(engine)
    assert isinstance(run_late(engine), EngineFailed)
    engine._thread.join(5)
    assert not engine.is_alive


def run_late(engine: EngineLoop) -> Exception | None:
    async def go() -> EngineFailed | None:
        try:
            engine.submit([1], SamplingParams(), "late")
        except EngineFailed as error:
            return error
        return None

    return asyncio.run(go())


class AcceleratorError(RuntimeError):
    """As torch raises it; the engine's thread knows no torch."""


@pytest.mark.parametrize(
    "fault",
    [
        AcceleratorError("whatever it says"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
    ],
)
def test_a_lost_gpu_is_not_tried_again(
    engine_of: StartEngine, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    runner = ScriptedRunner()
    runner.on_read = raising(fault, 2)
    engine = engine_of(runner, max_restarts=100)
    assert all(isinstance(result, EngineFailed) for result in run_all(engine, [9] * 6))
    assert engine.failed.result() is fault
    assert engine.stats().num_restarts == 0


def test_memory_that_is_short_is_no_lost_gpu() -> None:
    assert not is_poison(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_poison(ValueError("CUDA error"))


def test_restarts_are_forgotten_after_the_window() -> None:
    restarts = Restarts(FaultLimits(max_restarts=2, window_s=10.0))
    assert [restarts.allows(FAULT, now_s) for now_s in (0.0, 5.0, 9.9, 10.0, 11.0, 15.0)] == [
        *(True, True, False),
        *(True, False, True),
    ]
    assert restarts.total == 4
    assert not Restarts(FaultLimits(max_restarts=0)).allows(FAULT, 0.0)


@BOTH
def test_a_request_whose_result_is_an_error_fails_alone(engine_of: StartEngine, is_async: bool) -> None:
    lost = EngineFailed("its logits are not finite")
    runner = ScriptedRunner(is_async)
    runner.spoil = lambda chunk: lost if chunk.request.id == "2" and chunk.index == 4 else None
    engine = engine_of(runner)
    results = run_all(engine, [8] * 6)
    assert str(results[2]) == str(lost)
    assert results[:2] + results[3:] == [list(range(8))] * 5
    assert engine.stats().num_restarts == 0
    assert_empty(engine)


@BOTH
def test_too_few_blocks_are_no_fault(engine_of: StartEngine, is_async: bool) -> None:
    engine = engine_of(ScriptedRunner(is_async), rows=16, num_blocks=11)
    assert run_all(engine, [40] * 16) == [list(range(40))] * 16
    assert engine.stats().num_preemptions > 0
    assert (engine.stats().num_restarts, engine.failure) == (0, None)
    assert_empty(engine)


@BOTH
@EITHER
def test_a_stuck_step_fails_everyone_at_once(
    engine_of: StartEngine, is_async: bool, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    hang, runner = Hang(from_step=3), ScriptedRunner(is_async)
    setattr(runner, where, hang)
    engine = engine_of(runner, step_timeout_s=0.2)
    start_s = time.perf_counter()
    results = run_all(engine, [50] * 7)
    assert all(isinstance(result, EngineFailed) for result in results)
    assert time.perf_counter() - start_s >= 0.2
    assert isinstance(engine.failed.result(), StepStuck)
    assert_empty(engine)
    assert isinstance(run_late(engine), EngineFailed)
    (record,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    doing = "launching" if where == "on_execute" else "reading"
    assert f"stuck while {doing} a decode step of 4 tokens for 4 requests (0, 1, 2, 3), for 0.2 s" in record.message
    assert "self.release.wait(120)" in record.message
    # It ends after all: nobody hears of it again.
    was_alive = engine.is_alive
    assert was_alive
    hang.release.set()
    engine.stop(5)
    assert not engine.is_alive
    assert_empty(engine)


def test_a_step_that_waits_behind_a_stuck_one_fails_too(
    engine_of: StartEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Two engines of one device: the clients of the second would hang as long as the first, which is to blame."""
    device_thread, hang = DeviceThread(), Hang(from_step=0)
    stuck, other = ScriptedRunner(), ScriptedRunner()
    stuck.on_execute = hang
    first = engine_of(stuck, device_thread=device_thread, step_timeout_s=0.2)
    second = engine_of(other, device_thread=device_thread, step_timeout_s=0.2)

    async def go() -> list[list[int] | EngineFailed]:
        streams = [first.submit([1], SamplingParams(max_tokens=3), "r")]
        assert await asyncio.to_thread(hang.begun.wait, DEADLINE_S)
        streams.append(second.submit([1], SamplingParams(max_tokens=3), "r"))
        return await asyncio.gather(*map(outcome, streams))

    assert all(isinstance(result, EngineFailed) for result in asyncio.run(go()))
    hang.release.set()
    blamed = [record.getMessage().splitlines()[0] for record in caplog.records if record.levelname == "CRITICAL"]
    assert ["is stuck while launching" in blamed[0], "is stuck while waiting to launch" in blamed[1]] == [True, True]


def test_a_step_may_wait_for_the_device_longer_than_it_may_take(engine_of: StartEngine) -> None:
    device_thread, runner = DeviceThread(), ScriptedRunner()
    engine = engine_of(runner, device_thread=device_thread, step_timeout_s=0.4)
    held = threading.Thread(target=device_thread.run, args=(time.sleep, 0.5))
    held.start()
    assert run_all(engine, [3]) == [[0, 1, 2]]
    held.join()
    assert engine.failure is None


def test_a_long_run_of_quick_steps_is_not_stuck(engine_of: StartEngine) -> None:
    engine = engine_of(ScriptedRunner(step_s=0.02), step_timeout_s=1)
    assert run_all(engine, [60]) == [list(range(60))]
    time.sleep(1.1)
    assert run_all(engine, [2]) == [[0, 1]]
    assert engine.failure is None


@pytest.mark.parametrize("is_stuck", [False, True])
def test_stopping_tells_everyone_why(engine_of: StartEngine, is_stuck: bool) -> None:
    """Also where the thread cannot be told, as its step does not end."""
    hang, runner = Hang(from_step=2 if is_stuck else 10**9), ScriptedRunner(step_s=0.005)
    runner.on_execute = hang
    engine = engine_of(runner, rows=2)

    async def go() -> list[str]:
        streams = [engine.submit([1], SamplingParams(max_tokens=200), str(i)) for i in range(5)]
        told = asyncio.gather(*(refusal(stream) for stream in streams))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.stop, 0.2, Draining("the server is stopping"))
        return await asyncio.wait_for(told, DEADLINE_S)

    assert asyncio.run(go()) == ["the server is stopping"] * 5
    assert engine.is_alive == is_stuck
    assert engine.failure is None
    assert_empty(engine)
    hang.release.set()


async def refusal(stream: RequestStream) -> str:
    with pytest.raises(Draining) as caught:
        async for _ in stream:
            pass
    return caught.value.message


def test_who_was_put_back_while_its_token_was_lost_is_lost_too() -> None:
    """It waits, but nobody can say what its next token was to be; one that waits with all its tokens stays."""
    plan = Scheduler(num_blocks=64, block_size=4, max_num_requests=4, max_batched_tokens=64)
    told: list[News] = []
    inbox = Inbox("w8a8", plan, grammars=None, sink=told.append, read_others=lambda: (0, 0, 0, 0), masks=Masks(1.0))
    for handle, name in enumerate(("lost", "kept", "runs")):
        inbox.put(Submit("w8a8", handle + 1, handle, name, [1, 2], SamplingParams(max_tokens=9), 0.0, 0))
    inbox.take_in()
    lost, kept, _ = plan.waiting
    step = plan.schedule(0.0)
    for request in (lost, kept):
        plan._preempt(request)
    kept.num_pending = 0
    assert step is not None
    inbox.fail_running({lost}, EngineFailed("raised"))
    inbox.close(EngineFailed("closed"))
    ended = {end.handle: end.fault.message for news in told for end in news.ended if end.fault is not None}
    assert ended == {0: "raised", 1: "closed", 2: "raised"}
    assert plan.is_idle
    plan.check_integrity()


def test_a_step_that_ends_as_the_watchdog_looks_is_not_given_up(engine_of: StartEngine) -> None:
    engine = engine_of(ScriptedRunner())
    late = InHand("reading", Step([]), time.perf_counter() - 1000)
    assert not engine._give_up(late)
    assert engine.failure is None
    assert run_all(engine, [3]) == [[0, 1, 2]]
