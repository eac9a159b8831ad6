"""Sends one load, and records what becomes of each request."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from service.tools.bench.arrivals import Concurrency, Load
from service.tools.bench.client import CUT, Client, Exchange
from service.tools.bench.dialects import DONE, Dialect, Told, error_code, error_message
from service.tools.bench.http import Events
from service.tools.bench.measure import Phase
from service.tools.bench.record import Counted, Record

LEAD_S = 0.05
"""From the start to the first scheduled time, so that the first request is not late."""
LAG_EVERY_S = 0.02
TELL_EVERY_S = 0.5
YIELD_EVERY = 16
"""Overdue requests that are sent in a row before answers are read again."""
EMPTY = "no token"


@dataclass(frozen=True, slots=True)
class Planned:
    """A request as bytes. prompt_tokens: None if only the server can count them."""

    content: bytes
    prompt_tokens: int | None = None


@dataclass(slots=True)
class Tally:
    """How far a phase is. total: requests; None where a time ends it."""

    total: int | None
    sent: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    last_late_ms: float = 0.0

    @property
    def in_flight(self) -> int:
        return self.sent - self.done


Tell = Callable[[Tally], None]


class Stream:
    """A request on its way, whose events fill a record."""

    def __init__(self, planned: Planned, dialect: Dialect, record: Record, tally: Tally) -> None:
        self.record = record
        self.exchange = Exchange(planned.content, self._read)
        self._dialect = dialect
        self._tally = tally
        self._events = Events()
        self._usage: Told | None = None
        self._told: str | None = None
        self._last_s = 0.0
        self._is_done = False

    def finish(self) -> None:
        """Complete the record after the exchange's end."""
        record, exchange = self.record, self.exchange
        record.end_s = exchange.end_s
        if not record.token_s and self._is_done and self._usage is not None and self._usage.generated:
            # All tokens were without text, and told by usage alone.
            record.token_s.append(self._last_s)
        failure = exchange.failure or self._refusal()
        if failure is not None and not (self._is_done and failure[0] == CUT):
            record.error, record.detail = failure
        self._count()
        self._tally.done += 1
        self._tally.failed += record.error is not None

    def _read(self, piece: bytes, now_s: float) -> None:
        for event in self._events.feed(piece):
            if event == DONE:
                self._is_done = True
                continue
            num_tokens, usage, error = self._dialect.read(event)
            if num_tokens:
                self.record.token_s.extend([now_s] * num_tokens)
                self._tally.tokens += num_tokens
            if usage is None:
                self._last_s = now_s
            self._usage = usage or self._usage
            if error is not None:
                self._told = f"told of {error or 'a fault'}"
                self.exchange.body = event

    def _refusal(self) -> tuple[str, str] | None:
        """What is wrong with a response that came to its end."""
        status, body = self.exchange.response.status, self.exchange.body
        if status != 200:
            return f"HTTP {status} {error_code(body)}".strip(), error_message(body)
        if self._told is not None:
            return self._told, error_message(body)
        if not self._is_done:
            return CUT, "the stream ended without [DONE]"
        return None if self.record.token_s else (EMPTY, "the stream brought no token")

    def _count(self) -> None:
        record = self.record
        record.output_tokens, record.counted = len(record.token_s), self._dialect.counted
        if self._usage is None:
            record.counted = Counted.IDS if self._dialect.counted is Counted.IDS else Counted.EVENTS
            return
        record.prompt_tokens, record.cached_tokens = self._usage.prompt, self._usage.cached
        if self._dialect.counted is Counted.USAGE:
            record.output_tokens = self._usage.generated


@dataclass
class Driver:
    """Sends loads over one client. tell: called every half second with how far it is."""

    client: Client
    dialect: Dialect
    tell: Tell = field(default=lambda _: None)

    async def open_loop(self, planned: Sequence[Planned], times_s: Sequence[float]) -> Phase:
        """Send each request at its time, whatever has been answered, and wait for all answers."""
        tally = Tally(len(planned))
        streams: list[Stream] = []
        async with _Watch(self, tally) as watch:
            start_s = self.client.clock() + LEAD_S
            for number, (request, time_s) in enumerate(zip(planned, times_s, strict=True), 1):
                wait_s = start_s + time_s - self.client.clock()
                if wait_s > 0 or number % YIELD_EVERY == 0:
                    await asyncio.sleep(max(0.0, wait_s))
                streams.append(self._send(request, start_s + time_s, tally))
            await _ended(streams)
        return watch.phase([stream.record for stream in streams], start_s, is_open_loop=True)

    async def closed_loop(
        self, planned: Iterator[Planned], load: Concurrency, count: int | None, seconds: float | None
    ) -> Phase:
        """Keep so many requests running until count were sent, or no longer than seconds; then wait for the rest."""
        tally = Tally(count)
        records: list[Record] = []
        start_s = self.client.clock()

        def is_over() -> bool:
            # Workers go on to the next request only here, so none is begun past the limit.
            return (count is not None and tally.sent >= count) or (
                seconds is not None and self.client.clock() - start_s >= seconds
            )

        async def work() -> None:
            while not is_over():
                stream = self._send(next(planned), self.client.clock(), tally)
                records.append(stream.record)
                await stream.exchange.done

        async with _Watch(self, tally) as watch:
            await asyncio.gather(*(work() for _ in range(load.streams)))
            # Records are completed in callbacks of the same futures.
            await asyncio.sleep(0)
        return watch.phase(records, start_s, is_open_loop=False)

    async def warm_up(self, planned: Sequence[Planned]) -> None:
        """Send requests at once and forget their answers."""
        await self.open_loop(planned, [0.0] * len(planned))

    def _send(self, request: Planned, scheduled_s: float, tally: Tally) -> Stream:
        record = Record(scheduled_s, self.client.clock(), request.prompt_tokens)
        stream = Stream(request, self.dialect, record, tally)
        stream.exchange.done.add_done_callback(lambda _: stream.finish())
        self.client.send(stream.exchange)
        tally.sent += 1
        tally.last_late_ms = (record.sent_s - scheduled_s) * 1e3
        return stream


async def _ended(streams: Sequence[Stream]) -> None:
    for stream in streams:
        await stream.exchange.done
    # `finish` is called by the same futures.
    await asyncio.sleep(0)


class _Watch:
    """While a phase runs: samples how late the event loop wakes, and tells how far the phase is."""

    def __init__(self, driver: Driver, tally: Tally) -> None:
        self._driver = driver
        self._tally = tally
        self._lag_ms = array("d")
        self._cpu_s = 0.0
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _Watch:
        self._cpu_s = time.process_time()
        self._ticker = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cpu_s = time.process_time() - self._cpu_s
        if self._ticker is not None:
            self._ticker.cancel()

    def phase(self, records: Sequence[Record], start_s: float, *, is_open_loop: bool) -> Phase:
        end_s = max((record.end_s for record in records if record.end_s is not None), default=start_s)
        return Phase(records, start_s, end_s, self._lag_ms, self._cpu_s, is_open_loop)

    async def _tick(self) -> None:
        # Of the real clock, whatever clock stamps the records: this is about the process.
        started_s = told_s = time.perf_counter()
        while True:
            before_s = time.perf_counter()
            await asyncio.sleep(LAG_EVERY_S)
            now_s = time.perf_counter()
            self._lag_ms.append((now_s - before_s - LAG_EVERY_S) * 1e3)
            if now_s - told_s >= TELL_EVERY_S:
                told_s = now_s
                self._tally.elapsed_s = now_s - started_s
                self._driver.tell(self._tally)


async def drive(
    driver: Driver,
    load: Load,
    planned: Iterator[Planned],
    *,
    count: int | None,
    seconds: float | None,
    times_s: Sequence[float] | None = None,
) -> Phase:
    """One phase. count: None in a closed loop that ends by time; times_s: of an open loop."""
    if isinstance(load, Concurrency):
        await driver.client.open(load.streams)
        return await driver.closed_loop(planned, load, count, seconds)
    assert count is not None
    assert times_s is not None
    requests = [next(planned) for _ in range(count)]
    await driver.client.open(connections_ahead(times_s))
    return await driver.open_loop(requests, times_s)


AHEAD_S = 0.1


def connections_ahead(times_s: Sequence[float]) -> int:
    """How many requests arrive within any AHEAD_S: so many connections are opened before they do."""
    most = first = 0
    for number, time_s in enumerate(times_s):
        while times_s[first] < time_s - AHEAD_S:
            first += 1
        most = max(most, number - first + 1)
    return most
