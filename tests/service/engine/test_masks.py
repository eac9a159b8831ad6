"""Masks are made beside the steps: a dear grammar keeps nobody else waiting, and one too dear ends its own request."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Self

import pytest

from service.engine.api import FinishReason, SamplingParams
from service.engine.device.device_thread import DeviceThread
from service.engine.grammar import GivenUp, Grammar, Grammars
from service.engine.loop import EngineLoop
from service.engine.masks import QUICK_S, Constraint, Lane, Masks
from service.engine.scheduler import Scheduler
from service.errors import EngineFailed, InvalidRequest
from tests.support.scripted_runner import ScriptedRunner

DEADLINE_S = 60.0


class Slow:
    """A grammar of every text, and its own matcher. Each mask calls `work` first."""

    is_ready = True

    def __init__(self, work: Callable[[], object] = lambda: None, bits: bytes = b"\xff" * 64) -> None:
        self.work = work
        self.bits = bits
        self.mask_s = 0.0
        self.num_accepted = 0

    def matcher(self) -> Self:
        return self

    def allowed(self) -> bytes:
        self.work()
        return self.bits

    def accept(self, token_id: int) -> None:
        self.num_accepted += 1


class One:
    """Grammars that are all the same."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def compile(self, rules: str, num_answers: int = 1, given_up: GivenUp | None = None) -> Grammar:
        return self._grammar

    def known(self, rules: str) -> Grammar | None:
        return self._grammar

    def close(self) -> None:
        pass


def burn(seconds: float) -> None:
    """Use so much processor time."""
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        pass


class Evicted(One):
    """Grammars that are no longer known, each of which is compiled again until the gate opens or it is given up."""

    def __init__(self, grammar: Grammar, fault: Exception | None = None) -> None:
        super().__init__(grammar)
        self.gate = threading.Event()
        self.threads: list[str] = []
        self.given_up: list[GivenUp] = []
        self._fault = fault

    def known(self, rules: str) -> Grammar | None:
        return None

    def compile(self, rules: str, num_answers: int = 1, given_up: GivenUp | None = None) -> Grammar:
        assert given_up is not None
        self.threads.append(threading.current_thread().name)
        self.given_up.append(given_up)
        assert self.gate.wait(DEADLINE_S)
        if self._fault is not None:
            raise self._fault
        return self._grammar


def engine_with(
    grammar: Grammar, mask_s: float = 60.0, is_async: bool = False, grammars: Grammars | None = None
) -> EngineLoop:
    runner = ScriptedRunner()
    runner.is_async = is_async
    plan = Scheduler(num_blocks=64, block_size=4, max_num_requests=8, max_batched_tokens=64)
    return EngineLoop(
        "w8a8",
        plan,
        runner,
        device_thread=DeviceThread(),
        max_model_len=256,
        grammars=grammars or One(grammar),
        mask_s=mask_s,
    ).start()


HELD = SamplingParams(max_tokens=6, grammar="rules", owner="anna")
FREE = SamplingParams(max_tokens=12, owner="ben")


async def tokens_of(engine: EngineLoop, params: SamplingParams, name: str = "r") -> list[int]:
    stream = engine.submit([1, 2, 3], params, name)
    return [token.id async for tokens in stream for token in tokens]


@pytest.mark.parametrize("is_async", [False, True])
def test_answers_take_their_tokens_one_after_the_other(is_async: bool) -> None:
    grammar = Slow()
    engine = engine_with(grammar, is_async=is_async)

    async def go() -> tuple[list[int], list[int]]:
        return await asyncio.gather(tokens_of(engine, HELD), tokens_of(engine, FREE, "s"))

    held, free = asyncio.run(go())
    engine.stop()
    assert (len(held), len(free)) == (6, 12)
    # Not for the last one, after which nothing comes.
    assert grammar.num_accepted == 5


@pytest.mark.parametrize("is_async", [False, True])
def test_a_mask_that_takes_for_ever_keeps_nobody_else(is_async: bool) -> None:
    gate = threading.Event()
    grammar = Slow(lambda: gate.wait(DEADLINE_S))
    # As its trial found; a quick one would be waited for, if only for milliseconds.
    grammar.mask_s = 2 * QUICK_S
    engine = engine_with(grammar, is_async=is_async)

    async def go() -> tuple[bool, int]:
        held = asyncio.ensure_future(tokens_of(engine, HELD))
        for _ in range(3):
            assert len(await tokens_of(engine, FREE, "s")) == 12
        was_done = held.done()
        gate.set()
        return was_done, len(await held)

    assert asyncio.run(go()) == (False, 6)
    engine.stop()


def test_a_mask_that_is_slow_unexpectedly_does_so_once() -> None:
    gate = threading.Event()
    engine = engine_with(Slow(lambda: gate.wait(DEADLINE_S)))

    async def go() -> int:
        held = asyncio.ensure_future(tokens_of(engine, HELD))
        assert len(await tokens_of(engine, FREE, "s")) == 12
        gate.set()
        return len(await held)

    assert asyncio.run(go()) == 6
    engine.stop()


def refuse() -> None:
    raise ValueError("token 3 may not come here")


@pytest.mark.parametrize(
    ("grammar", "error", "words"),
    [
        (Slow(lambda: burn(0.05)), InvalidRequest, "this server's limit is 20 ms .max_mask_ms."),
        (Slow(bits=b"\0" * 64), InvalidRequest, "allows no token here"),
        (Slow(refuse), EngineFailed, "could not be followed"),
    ],
)
def test_a_grammar_that_fails_ends_its_own_request(grammar: Slow, error: type[Exception], words: str) -> None:
    engine = engine_with(grammar, mask_s=0.02)

    async def go() -> int:
        free = asyncio.ensure_future(tokens_of(engine, FREE, "s"))
        stream = engine.submit([1, 2, 3], HELD, "r")
        with pytest.raises(error, match=words):
            async for _ in stream:
                pass
        assert stream.progress.finish_reason is FinishReason.ABORT
        return len(await free)

    assert asyncio.run(go()) == 12
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert engine.failure is None
    engine.stop()


def test_a_request_that_ends_while_its_mask_is_made() -> None:
    gate = threading.Event()
    engine = engine_with(Slow(lambda: gate.wait(DEADLINE_S)))

    async def go() -> int:
        stream = engine.submit([1, 2, 3], HELD, "r")
        stream.finish(FinishReason.ABORT)
        await stream.released()
        gate.set()
        return len(await tokens_of(engine, FREE, "s"))

    assert asyncio.run(go()) == 12
    engine.stop()


def test_owners_take_turns() -> None:
    masks, lane = Masks(1.0), Lane({})
    made = [Constraint(masks, owner, place) for place, owner in enumerate("aaab")]
    for constraint in made:
        lane.put(constraint)
    taken = [lane.take() for _ in range(4)]
    assert [constraint.handle for constraint in taken if constraint is not None] == [0, 3, 1, 2]
    assert not lane.queues


def test_nothing_is_made_for_a_request_that_is_gone() -> None:
    lane = Lane({})
    lane.put(Constraint(Masks(1.0), "a", 1))
    gc.collect()
    assert lane.take() is None


@pytest.mark.parametrize("is_async", [False, True])
def test_a_grammar_that_was_evicted_is_compiled_again_beside_all_else(is_async: bool) -> None:
    """Once on the thread that reads the web's messages, which then read nothing: no new request, and no end of one."""
    grammar = Slow()
    grammars = Evicted(grammar)
    engine = engine_with(grammar, is_async=is_async, grammars=grammars)

    async def go() -> tuple[bool, int]:
        # `submit` puts the command, as the thread that reads does.
        held = asyncio.ensure_future(tokens_of(engine, HELD))
        for _ in range(3):
            assert len(await tokens_of(engine, FREE, "s")) == 12
        was_done = held.done()
        grammars.gate.set()
        return was_done, len(await held)

    assert asyncio.run(go()) == (False, 6)
    assert grammars.threads == ["grammar"]
    engine.stop()


def test_an_engine_that_waits_for_a_grammar_alone_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.loop.IDLE_S", 0.2)
    grammars = Evicted(Slow())
    engine = engine_with(Slow(), grammars=grammars)
    turns: list[float] = []
    turn = engine._turn

    def counted() -> None:
        turns.append(0.0)
        turn()

    monkeypatch.setattr(engine, "_turn", counted)

    async def go() -> int:
        held = asyncio.ensure_future(tokens_of(engine, HELD))
        await asyncio.sleep(0.5)
        assert 1 <= len(turns) <= 5
        grammars.gate.set()
        return len(await held)

    assert asyncio.run(go()) == 6
    engine.stop()


@pytest.mark.parametrize(
    ("fault", "error"),
    [(InvalidRequest("mend it"), InvalidRequest), (RuntimeError("why"), EngineFailed)],
    ids=["refused", "broken"],
)
def test_a_grammar_that_cannot_be_compiled_again_ends_its_own_request(fault: Exception, error: type[Exception]) -> None:
    grammars = Evicted(Slow(), fault)
    grammars.gate.set()
    engine = engine_with(Slow(), grammars=grammars)

    async def go() -> int:
        free = asyncio.ensure_future(tokens_of(engine, FREE, "s"))
        with pytest.raises(error):
            await tokens_of(engine, HELD)
        return len(await free)

    assert asyncio.run(go()) == 12
    assert engine.failure is None
    engine.stop()


def test_a_grammar_is_given_up_when_its_request_has_ended() -> None:
    grammars = Evicted(Slow())
    engine = engine_with(Slow(), grammars=grammars)

    async def go() -> None:
        stream = engine.submit([1, 2, 3], HELD, "r")
        while not grammars.given_up:
            await asyncio.sleep(0.001)
        assert not grammars.given_up[0].done()
        stream.finish(FinishReason.ABORT)
        await stream.released()
        await asyncio.to_thread(grammars.given_up[0].result, DEADLINE_S)

    asyncio.run(go())
    grammars.gate.set()
    engine.stop()
