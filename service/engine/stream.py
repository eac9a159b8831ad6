"""A submitted request, as iterated by a coroutine on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from service.engine.api import FinishReason, Progress, Token
from service.engine.messages import Submit

MAX_TOGETHER = 32
"""Most tokens per iteration. The backlog of a slow client is split, so that no part blocks the event loop for long."""


@dataclass(slots=True, eq=False)
class RequestStream:
    """Implements `service.engine.api.Stream`. Created and changed on the event loop's thread only.

    command: the message sent to the engine.
    on_finish: notifies the engine that the request ends early.
    num_steps, num_rows: steps it took part in, and the sum of the requests in them.
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
    num_accepted: int = 0
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
            num_accepted=self.num_accepted,
            batch_size_mean=self.num_rows / self.num_steps if self.num_steps else 0.0,
            prompt_logprobs=self.prompt_logprobs,
            is_released=self._released.is_set(),
        )

    @property
    def is_waiting(self) -> bool:
        """Whether it has neither started nor ended."""
        return self.first_scheduled_s is None and not self._is_over

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
        # A raised exception refers to its frames, and they to this stream: kept here or there it would close a cycle.
        error, self._error = self._error, None
        try:
            raise StopAsyncIteration if error is None else error
        finally:
            del error

    def add(self, token: Token, num_rows: int | None) -> None:
        """Add a token from the engine; after the end, or after `finish`, it is dropped.

        num_rows: requests of the step that brought it; None if the token before is of the same step.
        """
        self.num_generated += 1
        if num_rows is None:
            self.num_accepted += 1
        else:
            self.num_steps += 1
            self.num_rows += num_rows
        if not self._is_over:
            self._tokens.append(token)
            self._wake()

    def end(self, error: Exception | None) -> None:
        """Record that no more tokens will come, with the error that ended the request, if one did. Idempotent."""
        if not self._is_over:
            self._is_over, self._error = True, error
            self._wake()

    def finish(self, reason: FinishReason) -> None:
        """End the request early. Idempotent; has no effect on a request that has finished."""
        if not self.is_closed:
            self.is_closed = True
            self._tokens, self._is_over, self._error = [], True, None
            # No more tokens will arrive, so a pending `__anext__` has to be woken here.
            self._wake()
            self.on_finish(self, reason)

    async def released(self) -> None:
        """Return once the engine has freed what the request held."""
        await self._released.wait()

    def release(self) -> None:
        """Record that the engine has freed what the request held."""
        self._released.set()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
