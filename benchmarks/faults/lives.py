"""The end of a server: asked for, and not."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence

from benchmarks.faults.bench import LONG_TOKENS, PROMPTS, VARIANTS, Bench, ask_all, questions
from benchmarks.faults.case import Case
from benchmarks.faults.clients import Kind, Question, Seen, ask
from benchmarks.faults.server import POLL_S, Server
from benchmarks.processes import is_running

QUANTIZING = "quantizing layers"
ORPHAN_S = 5.0
"""For an engine to end once the web is gone."""

TOLD_S = 1.0
"""For every client to be told that its engine is gone."""


async def terminated(bench: Bench, case: Case) -> None:
    """SIGTERM with a full house: whoever is in is served, whoever comes is sent away, and the exit code is 0."""
    asked = questions(200, LONG_TOKENS)
    late = questions(50, 8)
    case.done = f"SIGTERM while {len(asked)} requests run and wait; {len(late)} come after it"
    with bench.serve() as server:
        await case.checked(server)
        before = server.rss_mb
        asking = asyncio.ensure_future(ask_all(server.port, asked))
        await _inside(server, len(asked))
        server.signal(signal.SIGTERM)
        while (await server.get("/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        seen = case.take(await ask_all(server.port, late), bench.answers, (Kind.REFUSED,))
        case.expect(set(seen) == {"503 draining"}, f"who came late saw {dict(seen)}")
        case.expect(not asking.done(), "all were answered before anybody came late")
        after = server.rss_mb
        seen = case.take(await asking, bench.answers)
        case.expect_equal(seen["200 length"], len(asked), "answered")
        case.rss_mb = before, after
        code = await server.ended(30.0)
        case.expect_equal(code, 0, "exit code")
        case.told.append(f"exit code {code}")


async def killed(bench: Bench, case: Case) -> None:
    """SIGKILL with a full house, and before that in the midst of quantizing: the next server serves at once."""
    asked = questions(200, LONG_TOKENS)
    cache = bench.folder / "killed-cache"
    arguments = ("--cache-dir", str(cache), "--calibration-windows", "2")
    models = (str(bench.float_folder),)
    case.done = f"SIGKILL while quantizing; then while {len(asked)} requests run; then a server on the same cache"
    with bench.serve(*arguments, models=models) as server:
        await _said(server, QUANTIZING)
        server.signal(signal.SIGKILL)
    with bench.serve(*arguments, models=models) as server:
        await case.checked(server)
        answers = await _own_answers(server)
        begun = Begun()
        asking = asyncio.gather(*(begun.ask(server.port, question) for question in asked))
        await begun.wait(20)
        engine = server.engine_pid
        server.signal(signal.SIGKILL)
        gone_s = await _gone_within(engine, ORPHAN_S)
        case.expect(gone_s is not None, f"the engine outlives the web by {ORPHAN_S:g} s")
        case.told.append(f"the engine is gone within {max(gone_s or ORPHAN_S, 0.1):.1f} s")
        allowed = (Kind.ANSWERED, Kind.CUT)
        seen = case.take(await asking, answers, allowed)
        case.expect(seen["cut off"] > 0, "nobody was cut off")
    start_s = time.perf_counter()
    with bench.serve(*arguments, models=models) as server:
        async with case.watching(server):
            took_s = time.perf_counter() - start_s
            case.expect(QUANTIZING not in server.said, "the cache was made anew")
            case.take(await ask_all(server.port, _of(answers)), answers)
            case.told.append(f"the next one is ready after {took_s:.1f} s and quantizes nothing")


async def engine_killed(bench: Bench, case: Case) -> None:
    """SIGKILL of the engine alone: those who run are told at once, another one starts, and serves those who wait."""
    running = [Question(PROMPTS[n % len(PROMPTS)], LONG_TOKENS, VARIANTS[n % 2], stream=True) for n in range(50)]
    after = questions(50, 24)
    case.done = f"SIGKILL of the engine while {len(running)} streams run; {len(after)} requests once it is ready again"
    with bench.serve() as server:
        async with case.watching(server):
            begun = Begun()
            asking = asyncio.gather(*(begun.ask(server.port, question) for question in running))
            await begun.wait(len(running))
            old = server.engine_pid
            os.kill(old, signal.SIGKILL)
            killed_s = time.perf_counter()
            seen = case.take(await asking, bench.answers, (Kind.FAILED,))
            told_s = time.perf_counter() - killed_s
            case.expect(told_s <= TOLD_S, f"the last client was told after {told_s:.2f} s, the limit is {TOLD_S:g}")
            case.expect(set(seen) == {"200, then engine_failed"}, f"clients saw {dict(seen)}")
            case.expect_equal((await server.get("/health")).status_code, 200, "/health")
            await case.checked(server)
            ready_s = time.perf_counter() - killed_s
            case.expect(not is_running(old), "the killed process is still there")
            case.take(await ask_all(server.port, after), bench.answers)
            case.expect_equal(await server.total("ottava_engine_restarts_total"), len(VARIANTS), "restarts")
            await case.expect_counted(server, {"length": len(after), "error": len(running), "abort": 0})
            case.told.append(f"all are told within {told_s:.2f} s; /health 200; ready again after {ready_s:.1f} s")


class Begun:
    """Asks, and tells how many answers have begun."""

    def __init__(self) -> None:
        self._count = asyncio.Semaphore(0)

    async def ask(self, port: int, question: Question) -> tuple[Question, Seen]:
        """See `clients.ask`."""
        has_begun = False

        def look(received: bytes) -> bool:
            nonlocal has_begun
            if not has_begun and received.count(b"data: ") >= 3:
                has_begun = True
                self._count.release()
            return False

        return question, await ask(port, question, leaves=look)

    async def wait(self, count: int) -> None:
        """Until so many have brought their third event."""
        for _ in range(count):
            await self._count.acquire()


async def _gone_within(pid: int, limit_s: float) -> float | None:
    """After how long a process is gone; None where it is not."""
    start_s = time.perf_counter()
    while is_running(pid):
        if time.perf_counter() - start_s > limit_s:
            return None
        await asyncio.sleep(POLL_S)
    return time.perf_counter() - start_s


async def _own_answers(server: Server) -> dict[tuple[str, str], tuple[int, ...]]:
    """The quiet answers of a server that quantized for itself, with other text than the one of all other cases."""
    asked = dict.fromkeys(Question(q.prompt, LONG_TOKENS, q.variant) for q in questions(48, LONG_TOKENS))
    return {(q.variant, q.prompt): (await ask(server.port, q)).token_ids for q in asked}


def _of(answers: dict[tuple[str, str], tuple[int, ...]]) -> Sequence[Question]:
    return [Question(prompt, 24, variant) for variant, prompt in answers]


async def _inside(server: Server, count: int) -> None:
    """Wait until so many requests run or wait."""
    async with asyncio.timeout(60):
        while (
            await server.total("ottava_num_requests_running") + await server.total("ottava_num_requests_waiting")
            < count
        ):
            await asyncio.sleep(0.01)


async def _said(server: Server, words: str) -> None:
    """Wait until a server has written these words."""
    async with asyncio.timeout(240):
        while words not in server.said:
            if server.process.poll() is not None:
                raise RuntimeError(f"the server ended: {server.said[-500:]}")
            await asyncio.sleep(0.02)
