"""Thread-safe access to an engine's scheduler: takes commands from any thread and sends news."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from service.engine.api import FinishReason
from service.engine.grammar import Grammar, Grammars, compiled, required
from service.engine.masks import Constraint, Masks
from service.engine.messages import Command, Ended, Fault, Gauges, News, Scored, Sink, Submit, fault_of
from service.engine.request import Request
from service.engine.scheduler import Scheduler, Step, StepResults
from service.errors import OttavaError


class Inbox:
    """All requests of one engine, from arrival to last token or error.

    wake: guards all state that the engine's thread shares with others, above all the scheduler. Never held while a
        step is launched or read; notified when there is work.
    sink: called with each piece of news, in order, while `wake` is held.

    Args:
        variant: name of the engine's variant.
        scheduler: the engine's scheduler.
        grammars: compiles the grammars of requests; None if the engine accepts none.
        read_others: returns restarts, weight bytes, KV cache bytes and late steps, which the scheduler does not have.
        masks: makes the masks of requests that have a grammar.
        first_ids: tokens that every prompt must begin with, and else is put behind.
    """

    def __init__(
        self,
        variant: str,
        scheduler: Scheduler,
        *,
        grammars: Grammars | None,
        sink: Sink,
        read_others: Callable[[], tuple[int, int, int, int]],
        masks: Masks,
        first_ids: Sequence[int] = (),
    ) -> None:
        self.wake = threading.Condition()
        self.sink = sink
        self._variant = variant
        self._scheduler = scheduler
        self._grammars = grammars
        self._read_others = read_others
        self._masks = masks
        self._first_ids = list(first_ids)
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
        """Whether a command has arrived since `take_in`."""
        return bool(self._arrived)

    @property
    def num_waiting(self) -> int:
        """Number of queued requests, including those not yet passed to the scheduler."""
        return len(self._scheduler.waiting) + self._num_unseen

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    def put(self, command: Command) -> None:
        """Queue a command; thread-safe. After `close`, a request ends at once with the error given to `close`."""
        # Not compiled here, if it is no longer known: this may be the thread that reads what the web sends.
        grammar = self._grammar(command.params.grammar) if isinstance(command, Submit) else None
        with self.wake:
            self._arrived.append((command, grammar))
            self._num_unseen += isinstance(command, Submit)
            if self.is_closed:
                self.take_in()
                self.publish()
            self.wake.notify()

    def take_in(self) -> None:
        """Pass new requests and early ends to the scheduler, and end the requests whose grammars have failed."""
        arrived, self._arrived = self._arrived, deque()
        self._num_unseen = 0
        for command, grammar in arrived:
            if isinstance(command, Submit):
                self._add(command, grammar)
            elif (request := self._requests.pop(command.handle, None)) is not None:
                self._scheduler.finish(request, command.reason, time.perf_counter())
                self._released.append(command.handle)
        for handle, error in self._masks.take_faults():
            if (lost := self._requests.get(handle)) is not None:
                self._drop([lost], fault_of(error))

    def note_scheduled(self, requests: Sequence[Request]) -> None:
        """Record in the next news that these requests have started."""
        for request in requests:
            if request.first_scheduled_s is not None:
                # One too many if a token of the sink was added; but equal to that of a variant without a sink.
                num_cached = min(request.num_cached, len(request.prompt_ids) - request.num_added)
                self._scheduled.append((request.handle, request.first_scheduled_s, num_cached))

    def commit(self, step: Step, results: StepResults) -> None:
        """Apply a step's results to the scheduler and publish them."""
        with self.wake:
            took = self._scheduler.commit(step, results)
            self.publish(self.news(step.num_requests, took, results))

    def fail_running(self, was_lost: set[Request], error: OttavaError) -> None:
        """End all running requests, and the queued ones in was_lost, with the error. Other queued requests stay."""
        with self.wake:
            waiting = [request for request in self._scheduler.waiting if request in was_lost]
            self._drop([*self._scheduler.running, *waiting], fault_of(error))
            # A step that failed may have written anything.
            self._scheduler.pool.forget_all()
            self._scheduler.check_integrity()
            self.publish()

    def fail_started(self, error: OttavaError) -> None:
        """End all requests that have started with the error, preempted ones too. Others stay."""
        with self.wake:
            self._drop([request for request in self._requests.values() if request.has_started], fault_of(error))
            self.publish()

    def close(self, error: OttavaError) -> None:
        """Accept no more requests and end all present ones with the error. Idempotent: the first error is kept."""
        with self.wake:
            self._closed = self._closed or fault_of(error)
            self.take_in()
            self._drop(list(self._requests.values()), self._closed)
            self.publish()

    def publish(self, news: News | None = None) -> None:
        """Send the news of a step, if given, plus everything since the last news. Sends nothing if nothing happened."""
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
        """The grammar of rules as far as it is compiled already, or why it is refused."""
        if rules is None:
            return None
        try:
            return required(self._grammars).known(rules)
        except OttavaError as error:
            return fault_of(error)

    def _add(self, command: Submit, grammar: Grammar | Fault | None) -> None:
        self._num_taken = command.number
        fault = grammar if isinstance(grammar, Fault) else self._closed
        if fault is not None:
            self._ended.append(Ended(command.handle, FinishReason.ABORT, time.perf_counter(), fault))
            return
        assert not isinstance(grammar, Fault)
        prompt_ids = self.begun(command.prompt_ids)
        request = Request(
            command.request_id,
            prompt_ids,
            command.params,
            command.arrival_s,
            command.seed,
            num_added=len(prompt_ids) - len(command.prompt_ids),
            handle=command.handle,
            matcher=self._constraint(command, grammar),
        )
        self._requests[command.handle] = request
        self._scheduler.add(request)

    def begun(self, prompt_ids: list[int]) -> list[int]:
        """A prompt as it is computed: it begins with first_ids."""
        first_ids = self._first_ids
        return prompt_ids if prompt_ids[: len(first_ids)] == first_ids else first_ids + prompt_ids

    def _constraint(self, command: Submit, grammar: Grammar | None) -> Constraint | None:
        """What holds an answer to its grammar; None if it has none. grammar: None also if it must be compiled again."""
        rules, owner = command.params.grammar, command.params.owner
        if grammar is not None:
            return self._masks.start(grammar, owner, command.handle)
        if rules is None:
            return None
        return self._masks.compile(partial(compiled, self._grammars, rules, 1), owner, command.handle)

    def news(self, num_requests: int, took: Sequence[tuple[int, Request]], results: StepResults) -> News:
        """The results of a step as news. The loops over all requests are kept minimal: a step may hold 256."""
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
        # A request with drafts took several tokens; only the last can be a fault.
        ended = {request: place for place, request in took if request.finish_reason is not None}
        for request, place in ended.items():
            self._end(request, results.faults.get(place))
        return news

    def _end(self, request: Request, error: Exception | None) -> None:
        """Record that a step has ended a request."""
        assert request.finish_reason is not None
        assert request.finished_s is not None
        fault = None if error is None else fault_of(error)
        self._ended.append(Ended(request.handle, request.finish_reason, request.finished_s, fault))
        del self._requests[request.handle]

    def gauges(self) -> Gauges:
        """One reading of the engine; thread-safe."""
        scheduler = self._scheduler
        num_restarts, weight_bytes, kv_cache_bytes, num_late_steps = self._read_others()
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
            scheduler.num_graph_steps,
            scheduler.num_plain_steps,
            scheduler.num_padding_tokens,
            num_late_steps,
            scheduler.num_draft_tokens,
            scheduler.num_accepted_tokens,
        )

    def _drop(self, requests: Sequence[Request], fault: Fault) -> None:
        now_s = time.perf_counter()
        for request in requests:
            self._scheduler.finish(request, FinishReason.ABORT, now_s)
            self._ended.append(Ended(request.handle, FinishReason.ABORT, now_s, fault))
            del self._requests[request.handle]
