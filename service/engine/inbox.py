"""The way into an engine's scheduler for those outside, and the news of it on the way back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from service.engine.api import FinishReason
from service.engine.grammar import Grammar, Grammars, compiled
from service.engine.messages import Command, Ended, Fault, Gauges, News, Scored, Sink, Submit, fault_of
from service.engine.request import Request
from service.engine.scheduler import Scheduler, Step, StepResults
from service.errors import OttavaError


class Inbox:
    """Everyone's requests of one engine, from their arrival to their last token or an error.

    wake: held for whatever the engine's thread and others both change, the scheduler above all, and never while a step
        is launched or read; notified when there is something to do.
    sink: takes the news, in order, with `wake` held.

    Args:
        variant: the engine's name.
        scheduler: of the engine.
        grammars: compiles what requests are constrained by; None where none may be.
        read_others: restarts, weight bytes and KV cache bytes, which the scheduler does not know.
    """

    def __init__(
        self,
        variant: str,
        scheduler: Scheduler,
        *,
        grammars: Grammars | None,
        sink: Sink,
        read_others: Callable[[], tuple[int, int, int]],
    ) -> None:
        self.wake = threading.Condition()
        self.sink = sink
        self._variant = variant
        self._scheduler = scheduler
        self._grammars = grammars
        self._read_others = read_others
        self._arrived: deque[tuple[Command, Grammar | Fault | None]] = deque()
        self._requests: dict[int, Request] = {}
        self._closed: Fault | None = None
        self._num_unseen = 0
        self._num_taken = 0
        self._num_told = 0
        self._scheduled: list[tuple[int, float, int]] = []
        self._released: list[int] = []
        self._ended: list[Ended] = []

    @property
    def has_word(self) -> bool:
        """Something came since `take_in`."""
        return bool(self._arrived)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those included that have not been taken in."""
        return len(self._scheduler.waiting) + self._num_unseen

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    def put(self, command: Command) -> None:
        """Take a command, from any thread. After `close` a request is told at once what the others were told."""
        # Compiled here, since on the engine's thread a step would wait for it.
        grammar = self._grammar(command.params.grammar) if isinstance(command, Submit) else None
        with self.wake:
            self._arrived.append((command, grammar))
            self._num_unseen += isinstance(command, Submit)
            if self.is_closed:
                self.take_in()
                self.publish()
            self.wake.notify()

    def take_in(self) -> None:
        """Tell the scheduler who came and who left."""
        arrived, self._arrived = self._arrived, deque()
        self._num_unseen = 0
        for command, grammar in arrived:
            if isinstance(command, Submit):
                self._add(command, grammar)
            elif (request := self._requests.pop(command.handle, None)) is not None:
                self._scheduler.finish(request, command.reason, time.perf_counter())
                self._released.append(command.handle)

    def note_scheduled(self, requests: Sequence[Request]) -> None:
        """Tell that these run from now on."""
        for request in requests:
            if request.first_scheduled_s is not None:
                self._scheduled.append((request.handle, request.first_scheduled_s, request.num_cached))

    def commit(self, step: Step, results: StepResults) -> None:
        """Hand out what a step brought."""
        with self.wake:
            took = self._scheduler.commit(step, results)
            self.publish(self.news(len(step.chunks), took, results))

    def fail_running(self, was_lost: set[Request], error: OttavaError) -> None:
        """End the requests that run, and of those that wait the ones whose results were lost. The others stay."""
        with self.wake:
            waiting = [request for request in self._scheduler.waiting if request in was_lost]
            self._drop([*self._scheduler.running, *waiting], fault_of(error))
            self._scheduler.check_integrity()
            self.publish()

    def close(self, error: OttavaError) -> None:
        """Take nobody more, and tell everyone who is here. Idempotent: the first error stays."""
        with self.wake:
            self._closed = self._closed or fault_of(error)
            self.take_in()
            self._drop(list(self._requests.values()), self._closed)
            self.publish()

    def publish(self, news: News | None = None) -> None:
        """Tell what a step brought, and what happened since the last news; nothing where nothing did."""
        if news is None:
            if not (self._scheduled or self._released or self._ended or self._num_told != self._num_taken):
                return
            news = News(self._variant, self.gauges())
        self._num_told = self._num_taken
        news.scheduled, self._scheduled = self._scheduled, []
        news.released, self._released = self._released, []
        news.ended, self._ended = self._ended, []
        self.sink(news)

    def _grammar(self, rules: str | None) -> Grammar | Fault | None:
        if rules is None:
            return None
        try:
            return compiled(self._grammars, rules)
        except OttavaError as error:
            return fault_of(error)

    def _add(self, command: Submit, grammar: Grammar | Fault | None) -> None:
        self._num_taken = command.number
        fault = grammar if isinstance(grammar, Fault) else self._closed
        if fault is not None:
            self._ended.append(Ended(command.handle, FinishReason.ABORT, time.perf_counter(), fault))
            return
        assert not isinstance(grammar, Fault)
        request = Request(
            command.request_id,
            command.prompt_ids,
            command.params,
            command.arrival_s,
            command.seed,
            handle=command.handle,
            matcher=None if grammar is None else grammar.matcher(),
        )
        self._requests[command.handle] = request
        self._scheduler.add(request)

    def news(self, num_requests: int, took: Sequence[tuple[int, Request]], results: StepResults) -> News:
        """What a step brought. The loops over all requests do next to nothing: 256 may share a step."""
        news = News(self._variant, self.gauges(), num_requests, results.time_s)
        told = [pair for pair in took if pair[0] not in results.faults] if results.faults else took
        news.handles = [request.handle for _, request in told]
        news.token_ids = [results.token_ids[place] for place, _ in told]
        if results.logprobs:
            found = ((place, results.logprobs.get(at)) for place, (at, _) in enumerate(told))
            news.logprobs = [(place, logprob) for place, logprob in found if logprob is not None]
        for request in [request for _, request in told if request.is_uncounted]:
            request.is_uncounted = False
            news.counted.append((request.handle, request.num_steps, request.num_batch_rows))
            if request.prompt_logprobs:
                news.scored.append(Scored(request.handle, results.time_s, request.prompt_logprobs))
        for place, request in [pair for pair in took if pair[1].finish_reason is not None]:
            self._end(request, results.faults.get(place))
        return news

    def _end(self, request: Request, error: Exception | None) -> None:
        """Note that a step has ended a request."""
        assert request.finish_reason is not None
        assert request.finished_s is not None
        fault = None if error is None else fault_of(error)
        self._ended.append(Ended(request.handle, request.finish_reason, request.finished_s, fault))
        del self._requests[request.handle]

    def gauges(self) -> Gauges:
        """One reading, from any thread."""
        scheduler = self._scheduler
        num_restarts, weight_bytes, kv_cache_bytes = self._read_others()
        return Gauges(
            self._num_taken,
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.pool.num_blocks,
            scheduler.pool.num_free,
            scheduler.num_preemptions,
            num_restarts,
            weight_bytes,
            kv_cache_bytes,
        )

    def _drop(self, requests: Sequence[Request], fault: Fault) -> None:
        now_s = time.perf_counter()
        for request in requests:
            self._scheduler.finish(request, FinishReason.ABORT, now_s)
            self._ended.append(Ended(request.handle, FinishReason.ABORT, now_s, fault))
            del self._requests[request.handle]
