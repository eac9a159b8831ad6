"""A submitted request as its client's coroutine sees it, and the way of news from the engine's thread to it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from service.engine.request import FinishReason, Request, Token

Item = list[Token] | Exception | None
"""The tokens of a step, what ended the request instead, or None after its last token."""


@dataclass(slots=True, eq=False)
class RequestStream:
    """See `service.engine.request.Stream`. on_finish: tells the engine of a request that ends early."""

    request: Request
    on_finish: Callable[[RequestStream, FinishReason], None]
    event_loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    is_closed: bool = False

    def __aiter__(self) -> AsyncIterator[list[Token]]:
        return self._tokens()

    async def _tokens(self) -> AsyncIterator[list[Token]]:
        while not self.is_closed:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item

    def finish(self, reason: FinishReason) -> None:
        """End the request early; a second call, or one after its last token, changes nothing."""
        if not self.is_closed:
            self.is_closed = True
            # Whoever waits for the next step would wait for ever: none comes any more.
            self.queue.put_nowait(None)
            self.on_finish(self, reason)


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
            stream.queue.put_nowait(item)
