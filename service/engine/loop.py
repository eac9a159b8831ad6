"""The thread that turns steps: schedule, execute, read, commit, publish."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from service.engine.request import EngineStats, FinishReason, Request, SamplingParams, Token
from service.engine.scheduler import Scheduler, Step
from service.engine.turnstile import Turnstile
from service.errors import EngineFailed, QueueFull

logger = logging.getLogger(__name__)


class Handle(Protocol):
    """A launched step: `read` waits for its tokens, one per chunk that samples."""

    def read(self) -> list[Token]: ...


class StepRunner(Protocol):
    """What the loop needs of a runner: `service.engine.runner.Runner`, or a fake in tests.

    is_async: `execute` returns before the device is done, so the next step can be planned meanwhile.
    """

    is_async: bool

    def execute(self, step: Step) -> Handle: ...

    @property
    def kv_cache_bytes(self) -> int: ...


@dataclass(slots=True, eq=False)
class RequestStream:
    """A submitted request as its client's coroutine sees it; see `service.engine.request.Stream`."""

    request: Request
    engine: EngineLoop
    event_loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[list[Token] | BaseException | None] = field(default_factory=asyncio.Queue)
    is_closed: bool = False

    def __aiter__(self) -> AsyncIterator[list[Token]]:
        return self._tokens()

    async def _tokens(self) -> AsyncIterator[list[Token]]:
        while not self.is_closed:
            item = await self.queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item

    def finish(self, reason: FinishReason) -> None:
        """End the request early; a second call, or one after its last token, changes nothing."""
        if not self.is_closed:
            self.is_closed = True
            self.engine.finish(self, reason)

    def deliver(self, items: list[list[Token] | BaseException | None]) -> None:
        """Hand over what a step brought; runs on the event loop's thread."""
        for item in items:
            self.queue.put_nowait(item)


class EngineLoop:
    """Runs one variant's requests on a thread of its own.

    Args:
        variant: its name.
        scheduler, runner: the plan and the device.
        turnstile: shared by the engines of one device, so that one step runs at a time.
        max_model_len: tokens a request may hold.
        max_waiting: requests that may queue.
        dtype: name of the activations' float type.
        weight_bytes: of the model, for the metrics.
    """

    def __init__(
        self,
        variant: str,
        scheduler: Scheduler,
        runner: StepRunner,
        turnstile: Turnstile,
        max_model_len: int,
        max_waiting: int = 1024,
        dtype: str = "float32",
        weight_bytes: int = 0,
    ) -> None:
        self.variant = variant
        self.max_model_len = max_model_len
        self.dtype = dtype
        self._scheduler = scheduler
        self._runner = runner
        self._turnstile = turnstile
        self._max_waiting = max_waiting
        self._weight_bytes = weight_bytes
        self._step_batch_sizes = [0] * (scheduler.max_num_requests + 1)
        self._inbox: deque[tuple[RequestStream, FinishReason | None]] = deque()
        self._num_unseen = 0
        self._streams: dict[Request, RequestStream] = {}
        self._wake = threading.Condition()
        self._is_stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"engine-{variant}", daemon=True)

    def start(self) -> EngineLoop:
        self._thread.start()
        return self

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step in flight; requests that still run are aborted."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, arrival_s: float | None = None
    ) -> RequestStream:
        """Queue a request; called from a running event loop.

        Raises:
            QueueFull: max_waiting requests wait already.
            EngineFailed: the engine's thread has ended.
        """
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        arrival_s = time.perf_counter() if arrival_s is None else arrival_s
        request = Request(request_id, prompt_ids, params, arrival_s, seed)
        stream = RequestStream(request, self, asyncio.get_running_loop())
        with self._wake:
            if self._failure is not None or self._is_stopping:
                raise EngineFailed(f"the engine of variant {self.variant!r} has stopped")
            if len(self._scheduler.waiting) + self._num_unseen >= self._max_waiting:
                raise QueueFull(
                    f"{self._max_waiting} requests are waiting for variant {self.variant!r}; try again later"
                )
            self._inbox.append((stream, None))
            self._num_unseen += 1
            self._wake.notify()
        return stream

    def finish(self, stream: RequestStream, reason: FinishReason) -> None:
        """End a request early; see `RequestStream.finish`."""
        with self._wake:
            self._inbox.append((stream, reason))
            self._wake.notify()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + self._num_unseen,
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
            num_preemptions=scheduler.num_preemptions,
            num_steps=sum(self._step_batch_sizes),
            step_batch_sizes=tuple(self._step_batch_sizes),
            weight_bytes=self._weight_bytes,
            kv_cache_bytes=self._runner.kv_cache_bytes,
        )

    def _run(self) -> None:
        try:
            self._turn_steps()
            self._end_all(EngineFailed(f"the engine of variant {self.variant!r} is stopping"))
        except Exception as error:
            logger.exception("engine %s failed", self.variant)
            self._failure = error
            self._end_all(EngineFailed(f"the engine of variant {self.variant!r} failed: {type(error).__name__}"))

    def _turn_steps(self) -> None:
        in_flight: tuple[Step, Handle] | None = None
        while self._wait_for_work(has_step=in_flight is not None):
            step = self._scheduler.schedule(time.perf_counter())
            launched = None
            if step is not None:
                launched = step, self._turnstile.run(self._runner.execute, step)
                self._step_batch_sizes[len(step.chunks)] += 1
            # On an asynchronous device the step before is read while this one runs.
            if in_flight is not None:
                self._settle(*in_flight)
            in_flight = launched
            if in_flight is not None and not self._runner.is_async:
                self._settle(*in_flight)
                in_flight = None

    def _wait_for_work(self, has_step: bool) -> bool:
        """Take in what arrived; sleep while there is nothing to do. False when the engine is to stop."""
        with self._wake:
            while not (self._inbox or self._is_stopping or has_step or not self._scheduler.is_idle):
                self._scheduler.check_integrity()
                self._wake.wait()
            arrived, self._inbox = self._inbox, deque()
            self._num_unseen = 0
            for stream, reason in arrived:
                if reason is None:
                    self._streams[stream.request] = stream
                    self._scheduler.add(stream.request)
                elif self._streams.pop(stream.request, None) is not None:
                    self._scheduler.finish(stream.request, reason, time.perf_counter())
            return not self._is_stopping

    def _settle(self, step: Step, handle: Handle) -> None:
        """Read a step's tokens, commit them, and publish them to their clients."""
        tokens = handle.read()
        by_request = {
            chunk.request: token for chunk, token in zip((c for c in step.chunks if c.samples), tokens, strict=True)
        }
        news: list[tuple[RequestStream, list[list[Token] | BaseException | None]]] = []
        for request in self._scheduler.commit(step, tokens):
            items: list[list[Token] | BaseException | None] = [[by_request[request]]]
            if request.is_finished:
                items.append(None)
            stream = self._streams.pop(request) if request.is_finished else self._streams[request]
            news.append((stream, items))
        _publish(news)

    def _end_all(self, error: BaseException) -> None:
        with self._wake:
            self._is_stopping = True
            for stream, reason in self._inbox:
                if reason is None:
                    self._streams[stream.request] = stream
                    self._scheduler.add(stream.request)
            self._inbox.clear()
            self._num_unseen = 0
        now_s = time.perf_counter()
        for request in list(self._streams):
            self._scheduler.finish(request, FinishReason.ABORT, now_s)
        _publish([(stream, [error]) for stream in self._streams.values()])
        self._streams.clear()


def _publish(news: list[tuple[RequestStream, list[list[Token] | BaseException | None]]]) -> None:
    """One wake-up per event loop and step, however many requests it serves."""
    by_loop = defaultdict(list)
    for stream, items in news:
        by_loop[stream.event_loop].append((stream, items))
    for event_loop, deliveries in by_loop.items():
        if not event_loop.is_closed():
            event_loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(deliveries: list[tuple[RequestStream, list[list[Token] | BaseException | None]]]) -> None:
    for stream, items in deliveries:
        stream.deliver(items)
