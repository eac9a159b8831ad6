"""The end of a server: asked for, and not."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence

from benchmarks.faults.bench import LONG_TOKENS, Bench, ask_all, questions
from benchmarks.faults.case import Case
from benchmarks.faults.clients import Kind, Question, Seen, ask
from benchmarks.faults.server import Server

QUANTIZING = "quantizing layers"


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
        num_begun = asyncio.Semaphore(0)

        async def one(question: Question) -> tuple[Question, Seen]:
            def has_begun(received: bytes) -> bool:
                if received.count(b"data: ") >= 3 and question not in begun:
                    begun.add(question)
                    num_begun.release()
                return False

            return question, await ask(server.port, question, leaves=has_begun)

        begun: set[Question] = set()
        asking = asyncio.gather(*(one(question) for question in asked))
        for _ in range(20):
            await num_begun.acquire()
        server.signal(signal.SIGKILL)
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
