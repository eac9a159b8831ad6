"""Loads against a scripted server: exact times, arrivals that wait for nobody, and every way to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import repeat

import pytest

from service.tools.bench.arrivals import Concurrency
from service.tools.bench.client import CUT, MALFORMED, REFUSED, TIMEOUT, Client, Target
from service.tools.bench.dialects import ROUTES
from service.tools.bench.drive import EMPTY, LEAD_S, Driver, Planned, Tally, connections_ahead
from service.tools.bench.measure import Phase, summarize
from service.tools.bench.record import Counted, Record
from tests.support.scripted_server import END, HEAD, Asked, Clock, Script, chunk, scripted, token, usage

HANG_S = 60.0
"""Far above what any test takes: reached only where something waits for ever."""

COMPLETIONS = ROUTES["completions"]


def drive(
    script: Script,
    load: Callable[[Driver, Planned], Awaitable[Phase]],
    *,
    route: str = "completions",
    timeout_s: float = HANG_S,
    clock: Clock | None = None,
    tell: Callable[[Tally], None] | None = None,
) -> list[Record]:
    """The records of a load on a server that follows the script."""

    async def run() -> list[Record]:
        async with asyncio.timeout(HANG_S), scripted(script) as server:
            target = Target.parse(server.url)
            client = Client(target, timeout_s, clock) if clock is not None else Client(target, timeout_s)
            driver = Driver(client, ROUTES[route]) if tell is None else Driver(client, ROUTES[route], tell)
            planned = Planned(target.request(ROUTES[route].path, {"max_tokens": 3}), 7)
            try:
                return list((await load(driver, planned)).records)
            finally:
                await client.close()

    return asyncio.run(run())


def in_turn(count: int, streams: int = 1) -> Callable[[Driver, Planned], Awaitable[Phase]]:
    return lambda driver, planned: driver.closed_loop(repeat(planned), Concurrency(streams), count, None)


def at(*times_s: float) -> Callable[[Driver, Planned], Awaitable[Phase]]:
    return lambda driver, planned: driver.open_loop([planned] * len(times_s), times_s)


async def answer(asked: Asked) -> None:
    await asked.write(HEAD + chunk(token()) + chunk(token()) + chunk(usage(7, 2)) + chunk("[DONE]") + END)


def one(script: Script, **options: float) -> Record:
    (record,) = drive(script, in_turn(1), **options)  # type: ignore[arg-type]
    return record


async def settled() -> None:
    """Let the client, on the same event loop, read and parse what was sent: a turn reads it, the next one parses."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_known_token_times_come_out_exactly() -> None:
    clock = Clock(10.0)
    seconds = {0: [10.25, 10.375, 10.625], 1: [11.0, 11.5]}

    async def script(asked: Asked) -> None:
        await asked.write(HEAD)
        for time_s in seconds[asked.number]:
            clock.now_s = time_s
            await asked.event(token())
            await settled()
        clock.now_s += 0.125
        await asked.event(usage(7, 5 if asked.number == 0 else 2))
        await asked.event("[DONE]")
        await asked.write(END)

    first, second = drive(script, in_turn(2), clock=clock)
    assert (first.sent_s, [*first.token_s], first.end_s) == (10.0, seconds[0], 10.75)
    assert (second.sent_s, [*second.token_s], second.end_s) == (10.75, seconds[1], 11.625)
    assert (first.ttft_s, first.e2e_s, first.gaps_s) == (0.25, 0.625, [0.125, 0.25])
    # Usage tells 5 tokens in 3 events.
    assert (first.output_tokens, first.tpot_s, first.counted) == (5, 0.375 / 4, Counted.USAGE)
    found = summarize([Phase([first, second], 10.0, 11.625, is_open_loop=False)])
    assert found.ttft is not None
    assert found.ttft.mean == 250.0
    assert found.itl is not None
    assert found.itl.mean == pytest.approx(875 / 3)
    assert found.e2el is not None
    assert (found.e2el.p50, found.output_tokens) == (687.5, 7)


def test_arrivals_wait_for_no_answer() -> None:
    """The server answers only once all of them have arrived: a generator that waits for answers never ends."""
    count, arrived = 30, asyncio.Event()

    async def script(asked: Asked) -> None:
        if asked.number == count - 1:
            arrived.set()
        await arrived.wait()
        await answer(asked)

    times_s = [n * 0.001 for n in range(count)]
    records = drive(script, at(*times_s))
    assert all(record.is_answered for record in records)
    start_s = records[0].scheduled_s
    assert [record.scheduled_s - start_s for record in records] == pytest.approx(times_s)
    assert all(record.sent_s >= record.scheduled_s for record in records)


def test_lateness_is_the_generators_own() -> None:
    """With a clock that is 2 s further at every look, each request is sent 2 s or more behind its time."""

    class Leaping(Clock):
        def __call__(self) -> float:
            self.now_s += 2.0
            return self.now_s

    records = drive(answer, at(0.0, 0.0, 0.0), clock=Leaping())
    late = [record.sent_s - record.scheduled_s for record in records]
    assert late[0] == pytest.approx(4.0 - LEAD_S)
    assert late == sorted(late)
    found = summarize([Phase(records, 0.0, 100.0)])
    assert found.lateness is not None
    assert found.lateness.max == pytest.approx(late[-1] * 1e3)


def test_a_closed_loop_keeps_so_many_running() -> None:
    """The server answers three at a time, which it can only if three are sent before an answer."""
    waiting: list[Asked] = []
    most = 0

    async def script(asked: Asked) -> None:
        nonlocal most
        waiting.append(asked)
        most = max(most, len(waiting))
        if len(waiting) == 3:
            for each in waiting:
                await answer(each)
            waiting.clear()

    records = drive(script, in_turn(9, streams=3))
    assert (len(records), most, all(record.is_answered for record in records)) == (9, 3, True)


def test_ids_count_tokens_of_generate() -> None:
    async def script(asked: Asked) -> None:
        await asked.write(HEAD + chunk({"id": "a", "token_ids": [5, 6], "text": ""}))
        await asked.event({"token_ids": [7], "text": "x"})
        await asked.event(
            {"token_ids": [5, 6, 7], "finish_reason": "length", "usage": {"prompt_tokens": 4}}
            | {"metrics": {"cached_tokens": 2}}
        )
        await asked.write(chunk("[DONE]") + END)

    (record,) = drive(script, in_turn(1), route="generate")
    assert (record.output_tokens, record.prompt_tokens, record.counted) == (3, 4, Counted.IDS)
    assert record.cached_tokens == 2
    assert len(record.gaps_s) == 2
    assert record.gaps_s[0] == 0.0


def test_a_server_without_usage_is_counted_by_events() -> None:
    async def script(asked: Asked) -> None:
        await asked.write(HEAD + chunk(token()) * 4 + chunk("[DONE]") + END)

    record = one(script)
    assert (record.output_tokens, record.prompt_tokens, record.counted) == (4, 7, Counted.EVENTS)


def test_a_refusal_has_its_status_and_code() -> None:
    async def script(asked: Asked) -> None:
        await asked.reply(503, {"error": {"message": "full", "type": "overloaded", "code": "queue_full"}})

    record = one(script)
    assert (record.error, record.detail, record.is_answered) == ("HTTP 503 queue_full", "full", False)


def test_a_500_without_json() -> None:
    async def script(asked: Asked) -> None:
        await asked.write(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops")

    record = one(script)
    assert (record.error, record.detail) == ("HTTP 500", "oops")


def test_a_stream_that_is_cut() -> None:
    async def script(asked: Asked) -> None:
        await asked.write(HEAD + chunk(token()))
        asked.close()

    record = one(script)
    assert (record.error, len(record.token_s), record.is_answered) == (CUT, 1, False)


def test_a_stream_that_ends_without_done() -> None:
    async def script(asked: Asked) -> None:
        await asked.write(HEAD + chunk(token()) + END)

    assert one(script).error == CUT


def test_a_connection_closed_behind_done_is_no_failure() -> None:
    async def script(asked: Asked) -> None:
        await asked.write(HEAD + chunk(token()) + chunk("[DONE]"))
        asked.close()

    assert one(script).is_answered


def test_a_stream_that_tells_of_a_fault() -> None:
    async def script(asked: Asked) -> None:
        await asked.write(HEAD + chunk(token()) + chunk({"error": {"code": "engine_failed", "message": "lost"}}) + END)

    record = one(script)
    assert (record.error, record.detail) == ("told of engine_failed", "lost")


def test_a_token_without_text_that_usage_alone_tells() -> None:
    async def script(asked: Asked) -> None:
        delta = {"delta": {"role": "assistant", "content": ""}, "finish_reason": "length"}
        await asked.write(HEAD + chunk({"choices": [delta]}) + chunk(usage(7, 1)) + chunk("[DONE]") + END)

    (record,) = drive(script, in_turn(1), route="chat")
    assert (record.is_answered, record.output_tokens, len(record.token_s)) == (True, 1, 1)


def test_no_token_and_no_sense() -> None:
    async def empty(asked: Asked) -> None:
        await asked.write(HEAD + chunk(usage(7, 0)) + chunk("[DONE]") + END)

    async def senseless(asked: Asked) -> None:
        await asked.write(HEAD + chunk("{half"))

    async def no_http(asked: Asked) -> None:
        await asked.write(b"220 mail.example.org ESMTP\r\n")

    assert one(empty).error == EMPTY
    assert one(senseless).error == MALFORMED
    assert one(no_http).error == MALFORMED


def test_a_timeout_ends_the_request_and_its_connection() -> None:
    closed = asyncio.Event()

    async def script(asked: Asked) -> None:
        await asked.write(HEAD + chunk(token()))
        await asked.writer.wait_closed()
        closed.set()

    record = one(script, timeout_s=0.05)
    assert (record.error, record.is_answered) == (TIMEOUT, False)


def test_nobody_listens() -> None:
    async def run() -> Record:
        async with scripted(answer) as server:
            pass
        target = Target.parse(server.url)
        client = Client(target, HANG_S)
        driver = Driver(client, COMPLETIONS)
        phase = await driver.open_loop([Planned(target.request("/x", {}))], [0.0])
        return phase.records[0]

    record = asyncio.run(run())
    assert record.error == REFUSED
    assert "refused" in record.detail.lower() or "connect" in record.detail.lower()


def test_connections_are_kept_and_one_that_the_server_closed_while_idle_is_replaced() -> None:
    connections: list[int] = []

    async def script(asked: Asked) -> None:
        connections.append(asked.writer.get_extra_info("peername")[1])
        if asked.number == 2:
            # As if it had timed out just when the third request was on its way.
            asked.close()
            return
        await answer(asked)

    records = drive(script, in_turn(3))
    assert [record.error for record in records] == [None] * 3
    assert connections[0] == connections[1] == connections[2] != connections[3]


def test_a_connection_that_the_server_wants_closed_is_not_used_again() -> None:
    connections: list[int] = []

    async def script(asked: Asked) -> None:
        connections.append(asked.writer.get_extra_info("peername")[1])
        head = HEAD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        await asked.write(head + chunk(token()) + chunk("[DONE]") + END)

    assert all(record.is_answered for record in drive(script, in_turn(2)))
    assert connections[0] != connections[1]


def test_connections_are_opened_ahead_for_what_arrives_together() -> None:
    assert connections_ahead([0.0] * 5) == 5
    assert connections_ahead([0.0, 0.05, 0.09, 0.5, 0.55]) == 3
    assert connections_ahead([]) == 0
