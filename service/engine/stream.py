"""A submitted request as its client's coroutine sees it, and the way of news from the engine's thread to it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.engine.api import FinishReason, Token
from service.engine.request import Request

MAX_TOGETHER = 32
"""Tokens; what a slow client has let pile up goes out in parts, and none of them keeps the event loop for long."""

Item = list[Token] | Exception | None
"""The tokens of a step, what ended the request instead, or None after its last token."""


@dataclass(slots=True, eq=False)
class RequestStream:
    """See `service.engine.request.Stream`. on_finish: tells the engine of a request that ends early."""

    request: Request
    on_finish: Callable[[RequestStream, FinishReason], None]
    event_loop: asyncio.AbstractEventLoop
    is_closed: bool = False
    _tokens: list[Token] = field(default_factory=list)
    _end: Exception | None = None
    _waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[Token]:
        if not self._tokens and self._end is None:
            self._waiter = self.event_loop.create_future()
            await self._waiter
        if self._tokens:
            tokens, self._tokens = self._tokens[:MAX_TOGETHER], self._tokens[MAX_TOGETHER:]
            return tokens
        assert self._end is not None
        raise self._end

    def put(self, item: Item) -> None:
        """Take in what the engine tells; what comes behind the end, or after `finish`, is dropped."""
        if self._end is not None:
            return
        if isinstance(item, list):
            self._tokens += item
        else:
            self._end = StopAsyncIteration() if item is None else item
        self._wake()

    def finish(self, reason: FinishReason) -> None:
        """End the request early; a second call, or one after its last token, changes nothing."""
        if not self.is_closed:
            self.is_closed = True
            self._tokens, self._end = [], StopAsyncIteration()
            # Whoever waits for the next step would wait for ever: none comes any more.
            self._wake()
            self.on_finish(self, reason)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


News = Sequence[tuple[RequestStream, list[Item]]]


def publish(news: News) -> None:
    """One wake-up per event loop and step, however many requests it serves."""
    by_loop = defaultdict(list)
    for stream, items in news:
        by_loop[stream.event_loop].append((stream, items))
    for event_loop, deliveries in by_loop.items():
        if not event_loop.is_closed():
            event_loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(news: News) -> None:
    for stream, items in news:
        for item in items:
            stream.put(item)
