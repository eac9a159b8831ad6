"""A submitted request as its client's coroutine sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from service.engine.api import FinishReason, Progress, Token
from service.engine.messages import Submit

MAX_TOGETHER = 32
"""Tokens; what a slow client has let pile up goes out in parts, and none of them keeps the event loop for long."""

Item = list[Token] | Exception | None
"""New tokens, what ended the request instead, or None after its last token."""


@dataclass(slots=True, eq=False)
class RequestStream:
    """See `service.engine.api.Stream`. Made and changed on the event loop's thread alone.

    command: what was sent to the engine.
    on_finish: tells the engine of a request that ends early.
    num_steps, num_rows: the steps it took part in, and the requests in them.
    """

    command: Submit
    on_finish: Callable[[RequestStream, FinishReason], None]
    event_loop: asyncio.AbstractEventLoop
    is_closed: bool = False
    first_scheduled_s: float | None = None
    finish_reason: FinishReason | None = None
    finished_s: float | None = None
    num_generated: int = 0
    num_cached: int = 0
    num_steps: int = 0
    num_rows: int = 0
    prompt_logprobs: tuple[Token, ...] = ()
    _tokens: list[Token] = field(default_factory=list)
    _is_over: bool = False
    _error: Exception | None = None
    _waiter: asyncio.Future[None] | None = None
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def progress(self) -> Progress:
        return Progress(
            first_scheduled_s=self.first_scheduled_s,
            finish_reason=self.finish_reason,
            finished_s=self.finished_s,
            num_generated=self.num_generated,
            num_cached=self.num_cached,
            batch_size_mean=self.num_rows / self.num_steps if self.num_steps else 0.0,
            prompt_logprobs=self.prompt_logprobs,
            is_released=self._released.is_set(),
        )

    @property
    def seed(self) -> int:
        return self.command.seed

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[Token]:
        if not self._tokens and not self._is_over:
            self._waiter = self.event_loop.create_future()
            await self._waiter
        if self._tokens:
            tokens, self._tokens = self._tokens[:MAX_TOGETHER], self._tokens[MAX_TOGETHER:]
            return tokens
        # Raised, an exception knows the frames that it passed: kept, it would keep them and this stream in a cycle.
        error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopAsyncIteration

    def put(self, item: Item) -> None:
        """Take in what the engine tells; what comes behind the end, or after `finish`, is dropped."""
        if self._is_over:
            return
        if isinstance(item, list):
            self._tokens += item
        else:
            self._is_over, self._error = True, item
        self._wake()

    def finish(self, reason: FinishReason) -> None:
        """End the request early; a second call, or one after its last token, changes nothing."""
        if not self.is_closed:
            self.is_closed = True
            self._tokens, self._is_over, self._error = [], True, None
            # Whoever waits for the next step would wait for ever: none comes any more.
            self._wake()
            self.on_finish(self, reason)

    async def released(self) -> None:
        """Return once the engine holds nothing of the request."""
        await self._released.wait()

    def release(self) -> None:
        """Note that the engine holds nothing of the request."""
        self._released.set()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
