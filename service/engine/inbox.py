"""The clients of an engine: their requests on the way into the scheduler, and what becomes of them on the way back."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Sequence

from service.engine.api import FinishReason, SamplingParams, Token
from service.engine.request import Request
from service.engine.scheduler import Result, Scheduler, Step
from service.engine.stream import Item, News, RequestStream, publish
from service.errors import EngineFailed, OttavaError, QueueFull


class Clients:
    """Everyone who waits for an engine, from `submit` to the last token or an error.

    wake: held for whatever the engine's thread and those outside both change, the scheduler above all, and never
        while a step is launched or read; notified when there is something to do.

    Args:
        variant: the engine's name, for messages.
        scheduler: of the engine.
        max_waiting: requests that may queue.
    """

    def __init__(self, variant: str, scheduler: Scheduler, max_waiting: int) -> None:
        self.wake = threading.Condition()
        self.is_closed = False
        self._variant = variant
        self._scheduler = scheduler
        self._max_waiting = max_waiting
        self._inbox: deque[tuple[RequestStream, FinishReason | None]] = deque()
        self._num_unseen = 0
        self._streams: dict[Request, RequestStream] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting) + self._num_unseen

    @property
    def has_word(self) -> bool:
        """Someone came or left since `take_in`."""
        return bool(self._inbox)

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, arrival_s: float | None
    ) -> RequestStream:
        """See `service.engine.request.Engine.submit`."""
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        arrival_s = time.perf_counter() if arrival_s is None else arrival_s
        request = Request(request_id, prompt_ids, params, arrival_s, seed)
        stream = RequestStream(request, self._finish, asyncio.get_running_loop())
        with self.wake:
            self.refuse_if_closed()
            if self.num_waiting >= self._max_waiting:
                raise QueueFull(
                    f"{self._max_waiting} requests are waiting for variant {self._variant!r}; try again later"
                )
            self._inbox.append((stream, None))
            self._num_unseen += 1
            self.wake.notify()
        return stream

    def refuse_if_closed(self) -> None:
        """Raise EngineFailed once `close` or `stop` was called."""
        if self.is_closed:
            raise EngineFailed(f"the engine of variant {self._variant!r} has stopped")

    def take_in(self) -> None:
        """Tell the scheduler who came and who left."""
        arrived, self._inbox = self._inbox, deque()
        self._num_unseen = 0
        for stream, reason in arrived:
            if reason is None:
                self._streams[stream.request] = stream
                self._scheduler.add(stream.request)
            elif self._streams.pop(stream.request, None) is not None:
                self._scheduler.finish(stream.request, reason, time.perf_counter())

    def commit(self, step: Step, results: Sequence[Result]) -> None:
        """Hand out what a step brought."""
        by_request = {
            chunk.request: result for chunk, result in zip((c for c in step.chunks if c.samples), results, strict=True)
        }
        news: list[tuple[RequestStream, list[Item]]] = []
        with self.wake:
            for request in self._scheduler.commit(step, results):
                result = by_request[request]
                items: list[Item] = [[result]] if isinstance(result, Token) else [result]
                if request.is_finished:
                    items.append(None)
                stream = self._streams.pop(request) if request.is_finished else self._streams[request]
                news.append((stream, items))
        publish(news)

    def fail_running(self, was_lost: set[Request], error: OttavaError) -> None:
        """End the requests that run, and of those that wait the ones whose results were lost. The others stay."""
        with self.wake:
            waiting = [request for request in self._scheduler.waiting if request in was_lost]
            news = self._drop([*self._scheduler.running, *waiting], error)
            self._scheduler.check_integrity()
        publish(news)

    def close(self, error: OttavaError) -> None:
        """Take nobody more, and tell everyone who is here. Again: no effect."""
        with self.wake:
            self.is_closed = True
            self.take_in()
            news = self._drop(list(self._streams), error)
        publish(news)

    def _finish(self, stream: RequestStream, reason: FinishReason) -> None:
        with self.wake:
            self._inbox.append((stream, reason))
            self.wake.notify()

    def _drop(self, requests: Sequence[Request], error: OttavaError) -> News:
        now_s = time.perf_counter()
        for request in requests:
            self._scheduler.finish(request, FinishReason.ABORT, now_s)
        return [(self._streams.pop(request), [error]) for request in requests]
