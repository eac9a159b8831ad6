"""Many clients, all of them well-behaved: more than there is room for, alike, or for long."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from itertools import islice

from benchmarks.faults.bench import LONG_TOKENS, Bench, ask_all, questions
from benchmarks.faults.case import Case, is_right
from benchmarks.faults.clients import Kind, Question, Seen, ask
from benchmarks.faults.server import Server
from service.text.tokenizer import Tokenizer

NUM_CLIENTS = 1000
NUM_REQUESTS = 10_000
NUM_WARM = 1000
"""Requests after which allocators and caches have what they keep."""

MAX_TIE_NATS = 0.1
"""Between two tokens that rounding may exchange: a quarter of the median lead of the tiny model's tokens. Partings that
were seen lie below 0.05."""

MAX_TIES = 3
"""Of one answer of 300 tokens; a wrong one would part from what is likely over and over."""

MAX_GROWTH_MB = 9.0
"""Of memory, in the 9,000 requests after these: 1 KiB a request, less than a leaked one of any kind would take."""


async def crowd(bench: Bench, case: Case) -> None:
    """A thousand at once, and a queue for all of them."""
    asked = questions(NUM_CLIENTS, 16)
    case.done = f"{len(asked)} clients at once, half of them streams, both variants"
    with bench.serve() as server:
        async with case.watching(server):
            seen = case.take(await ask_all(server.port, asked), bench.answers)
            case.expect_equal(seen["200 length"], NUM_CLIENTS, "answered")
            await case.expect_counted(server, {"length": NUM_CLIENTS, "abort": 0, "error": 0, "rejected": 0})


async def overload(bench: Bench, case: Case) -> None:
    """A thousand at once, and a queue for a few."""
    max_waiting = 20
    asked = questions(NUM_CLIENTS, 96)
    case.done = f"{len(asked)} clients at once, {max_waiting} may wait for a variant"
    with bench.serve("--max-waiting", str(max_waiting)) as server:
        async with case.watching(server):
            allowed = (Kind.ANSWERED, Kind.REFUSED)
            seen = case.take(await ask_all(server.port, asked), bench.answers, allowed)
            case.expect_equal(
                seen["200 length"] + seen["503 queue_full"], NUM_CLIENTS, "answered or told to come again"
            )
            case.expect(min(seen["200 length"], seen["503 queue_full"]) > 0, "there were not both")
            ends = {"length": seen["200 length"], "rejected": seen["503 queue_full"], "abort": 0, "error": 0}
            await case.expect_counted(server, ends)


async def same_ids(bench: Bench, case: Case) -> None:
    """Everybody names the request as everybody else does."""
    asked = questions(100, 24)
    case.done = f"{len(asked)} clients at once, all with X-Request-Id: same"
    with bench.serve() as server:
        async with case.watching(server):

            async def one(question: Question) -> tuple[Question, Seen]:
                return question, await ask(server.port, question, {"x-request-id": "same"})

            pairs = await asyncio.gather(*(one(question) for question in asked))
            case.take(pairs, bench.answers)
            answer_ids = {seen.answer_id for _, seen in pairs}
            case.expect_equal(len(answer_ids), len(asked), "distinct ids of answers")
            case.expect_equal({seen.headers.get("x-request-id") for _, seen in pairs}, {"same"}, "X-Request-Id out")
            case.told.append(f"{len(answer_ids)} ids of answers")


async def out_of_blocks(bench: Bench, case: Case) -> None:
    """A cache that holds a tenth of what the requests need: they take turns."""
    num_tokens = 1536
    asked = questions(48, LONG_TOKENS)
    case.done = f"{len(asked)} requests of {LONG_TOKENS} tokens, room for {num_tokens} tokens a variant"
    with bench.serve("--max-model-len", "1024", num_kv_tokens=num_tokens) as server:
        async with case.watching(server):
            pairs = await ask_all(server.port, asked)
            num_preempted = int(await server.total("ottava_preemptions_total"))
            case.expect(num_preempted > 0, "nobody was preempted")
            case.told.append(f"{num_preempted} preemptions")
            await case.expect_counted(server, {"length": len(asked), "abort": 0, "error": 0})
            for question, seen in pairs:
                answers, gaps = dict(bench.answers), []
                if seen.kind is Kind.ANSWERED and not is_right(question, seen, answers):
                    gaps = await retold_alone(bench, server, question, seen)
                if gaps and max(gaps) <= MAX_TIE_NATS and len(gaps) <= MAX_TIES:
                    answers[question.variant, question.prompt] = seen.token_ids
                    case.told.append(f"an answer went the other way between tokens {max(gaps):.3f} nats apart")
                case.take([(question, seen)], answers)


async def retold_alone(bench: Bench, server: Server, question: Question, seen: Seen) -> list[float]:
    """Where an answer parts from the quiet one, how much likelier the quiet token was, in nats; again for what follows.

    A preempted request is computed again as a prompt, whose attention sums in another order than that of single tokens
    does: where two tokens are about equally likely, either may come. What comes after is judged from there on.
    """
    prompt_ids = Tokenizer.from_folder(bench.float_folder).encode(question.prompt)
    wanted, gaps = bench.answers[question.variant, question.prompt][: question.max_tokens], []
    while seen.token_ids != wanted:
        pairs = zip(seen.token_ids, wanted, strict=True)
        place = next(place for place, (found, quiet) in enumerate(pairs) if found != quiet)
        known = prompt_ids + list(seen.token_ids[:place])
        body = {"prompt_ids": known, "max_tokens": 1, "variant": question.variant, "logprobs": 20}
        (told,) = (await server.post(body))["logprobs"]
        likely = {entry["id"]: entry["logprob"] for entry in told["top"]}
        gaps.append(likely[told["id"]] - likely.get(seen.token_ids[place], -math.inf))
        num_left = question.max_tokens - place - 1
        if not num_left:
            break
        known += [seen.token_ids[place]]
        body = {"prompt_ids": known, "max_tokens": num_left, "variant": question.variant, "ignore_eos": True}
        wanted = (*seen.token_ids[: place + 1], *(await server.post(body))["token_ids"])
    return gaps


async def soak(bench: Bench, case: Case) -> None:
    """Ten thousand requests, 32 at a time."""
    asked = iter(questions(NUM_REQUESTS, 4))
    case.done = f"{NUM_REQUESTS} requests, 32 at a time; memory from the {NUM_WARM}th on"
    with bench.serve() as server:
        async with case.watching(server):
            case.take(await _in_turns(server.port, islice(asked, NUM_WARM)), bench.answers)
            warm_mb = server.rss_mb
            case.take(await _in_turns(server.port, asked), bench.answers)
            await case.expect_counted(server, {"length": NUM_REQUESTS, "abort": 0, "error": 0})
    assert case.rss_mb is not None
    case.rss_mb = warm_mb, case.rss_mb[1]
    growth_mb = case.rss_mb[1] - warm_mb
    case.expect(growth_mb <= MAX_GROWTH_MB, f"memory grew by {growth_mb:.1f} MB, the limit is {MAX_GROWTH_MB:g}")


async def _in_turns(port: int, asked: Iterator[Question]) -> list[tuple[Question, Seen]]:
    """All of them, each of 32 clients sending its next when it has its last."""

    async def client() -> list[tuple[Question, Seen]]:
        return [(question, await ask(port, question)) for question in asked]

    return [pair for pairs in await asyncio.gather(*(client() for _ in range(32))) for pair in pairs]
