"""One runner takes the place of another while requests run and wait."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest

from service.engine.api import SamplingParams
from service.errors import EngineFailed, OttavaError, WeightsReplaced
from tests.service.kinds import StartEngine
from tests.support.faulty_engines import BOTH, FAULT, assert_empty, outcome, run_all
from tests.support.harness import DEADLINE_S
from tests.support.scripted_runner import ScriptedRunner, raising


@BOTH
def test_an_exchange_lets_the_running_end_on_the_old_and_loses_nobody(engine_of: StartEngine, is_async: bool) -> None:
    """Old tokens count from 0, new ones from 1000; too few blocks, so that some are put back meanwhile."""
    old, new = ScriptedRunner(is_async, step_s=0.001), ScriptedRunner(is_async, offset=1000)
    engine = engine_of(old, rows=4, num_blocks=12)

    async def go() -> list[list[int] | EngineFailed]:
        params = SamplingParams(max_tokens=20)
        streams = [engine.submit([1, 2, 3], params, str(i)) for i in range(12)]
        answers = [asyncio.ensure_future(outcome(stream)) for stream in streams]
        while engine.stats().num_running < 3:
            await asyncio.sleep(0.001)
        exchanged = asyncio.wrap_future(engine.exchange(new, 20, 77, DEADLINE_S))
        more = [asyncio.ensure_future(outcome(engine.submit([1], params, str(i)))) for i in range(12, 20)]
        await asyncio.wait_for(exchanged, DEADLINE_S)
        num_steps = old.num_steps
        results = await asyncio.wait_for(asyncio.gather(*answers, *more), 20)
        assert old.num_steps == num_steps
        return results

    results = asyncio.run(go())
    before, after = list(range(20)), list(range(1000, 1020))
    num_old = results.count(before)
    assert 3 <= num_old < 12
    assert results == [before] * num_old + [after] * (20 - num_old)
    stats = engine.stats()
    assert (stats.num_blocks, stats.weight_bytes) == (20, 77)
    assert stats.num_preemptions > 0
    assert_empty(engine)


def test_an_idle_engine_exchanges_at_once(engine_of: StartEngine) -> None:
    engine = engine_of(ScriptedRunner())
    engine.exchange(ScriptedRunner(offset=5), 64, 0, 0.0).result(5)
    assert run_all(engine, [2]) == [[5, 6]]


@BOTH
def test_an_exchange_waits_for_so_long_then_ends_those_that_run(engine_of: StartEngine, is_async: bool) -> None:
    """One that has been put back for want of blocks too; without the limit they hold the door for a second."""
    engine = engine_of(ScriptedRunner(is_async, step_s=0.01), rows=2, num_blocks=30)

    async def ended(name: str) -> OttavaError:
        with pytest.raises(WeightsReplaced) as caught:
            async for _ in engine.submit([1, 2, 3], SamplingParams(max_tokens=100), name):
                pass
        return caught.value

    async def go() -> tuple[list[OttavaError], list[int] | EngineFailed]:
        running = [asyncio.ensure_future(ended(name)) for name in "ab"]
        while not engine.stats().num_preemptions:
            await asyncio.sleep(0.001)
        exchanged = asyncio.wrap_future(engine.exchange(ScriptedRunner(is_async, offset=1000), 12, 0, 0.0))
        waiting = asyncio.ensure_future(outcome(engine.submit([1], SamplingParams(max_tokens=2), "c")))
        await asyncio.wait_for(exchanged, DEADLINE_S)
        return await asyncio.wait_for(asyncio.gather(*running), DEADLINE_S), await waiting

    errors, after = asyncio.run(go())
    assert [(error.status, error.headers) for error in errors] == [(503, {"retry-after": "1"})] * 2
    assert "waited 0 s" in errors[0].message
    assert after == [1000, 1001]
    assert_empty(engine)


def test_a_fault_before_the_exchange_does_not_prevent_it(
    engine_of: StartEngine, caplog: pytest.LogCaptureFixture
) -> None:
    old = ScriptedRunner(step_s=0.002)
    old.on_execute = raising(FAULT, 8)
    engine = engine_of(old, rows=1)

    async def go() -> list[list[int] | EngineFailed]:
        streams = [engine.submit([1], SamplingParams(max_tokens=50), str(i)) for i in range(3)]
        await asyncio.sleep(0.005)
        engine.exchange(ScriptedRunner(offset=100), 64, 0, DEADLINE_S)
        return await asyncio.gather(*map(outcome, streams))

    first, *others = asyncio.run(go())
    assert isinstance(first, EngineFailed)
    assert others == [list(range(100, 150))] * 2


def test_an_engine_that_ends_first_tells_whoever_waits_for_the_exchange(engine_of: StartEngine) -> None:
    engine = engine_of(ScriptedRunner(step_s=0.005))

    async def go() -> Future[None]:
        stream = engine.submit([1], SamplingParams(max_tokens=200), "r")
        await asyncio.sleep(0.02)
        exchanged = engine.exchange(ScriptedRunner(), 64, 0, DEADLINE_S)
        await asyncio.to_thread(engine.stop)
        assert isinstance(await outcome(stream), EngineFailed)
        return exchanged

    assert "ended before the exchange" in str(asyncio.run(go()).exception(5))
    with pytest.raises(EngineFailed):
        engine.exchange(ScriptedRunner(), 64, 0, DEADLINE_S)
