"""The engine's main loop on a thread: schedule, execute, read, commit, publish."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

from service.busy_poll import BusyPoll
from service.engine.api import EngineStats, SamplingParams
from service.engine.client import EngineClient
from service.engine.device.device_thread import DeviceThread
from service.engine.grammar import MASK_S, GivenUp, Grammars, compiled
from service.engine.inbox import Inbox
from service.engine.just_in_time import JustInTime
from service.engine.masks import Masks
from service.engine.messages import Command, News, Sink
from service.engine.request import Request
from service.engine.scheduler import Scheduler, Step, StepResults
from service.engine.shapes import Shape
from service.engine.stream import RequestStream
from service.engine.supervision import FaultLimits, InHand, Restarts, StepStuck, Watchdog, describe, is_poison, stacks
from service.errors import EngineFailed, OttavaError, ReloadFailed, WeightsReplaced

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

CHECK_AFTER_S = 1.0
"""How long an engine rests before it checks that nothing was lost. The check takes 10 ms for a cache of 16,000 blocks,
which the next request of a client that sends one after the other would wait for."""


MASKS_S = 0.005
"""Longest that a step waits for quick masks. Most take 20 to 50 us, and 64 of them 3 ms."""
LOOK_S = 0.0005
"""How long an engine that waits for the end of a step waits before it looks whether that has come early: a step that
attends to fewer keys than those before it takes less time."""
IDLE_S = 0.01
"""How long an engine that can do nothing but wait for a mask waits before it looks for new requests."""


class Handle(Protocol):
    """A launched step; `read` waits for its results.

    shape: the captured shape in which it runs, or None.   is_done: whether `read` would not wait.
    """

    @property
    def shape(self) -> Shape | None: ...

    @property
    def is_done(self) -> bool: ...

    def read(self) -> StepResults: ...


class StepRunner(Protocol):
    """Runs steps: `service.engine.device.runner.Runner`, or a fake in tests.

    is_async: `execute` returns before the device has finished, so that the next step can be planned meanwhile.
    only_launches: it hardly computes and never waits, so that the engine's own thread may call it.
    """

    is_async: bool

    @property
    def only_launches(self) -> bool: ...

    def execute(self, step: Step) -> Handle: ...

    @property
    def kv_cache_bytes(self) -> int: ...


class Unread(NamedTuple):
    """A launched step whose results have not been read. was_late: the one before had ended when it was launched."""

    step: Step
    handle: Handle
    was_late: bool


@dataclass(frozen=True, slots=True)
class Exchange:
    """A pending replacement of the runner.

    wait_s, until_s: how long running requests may go on, and until when, from `time.perf_counter`.
    done: resolves once it is in place, or to the error that prevented it.
    """

    runner: StepRunner
    num_blocks: int
    weight_bytes: int
    wait_s: float
    until_s: float
    done: Future[None] = field(default_factory=Future)


class EngineLoop:
    """Runs one variant's requests on its own thread.

    A step that raises fails all running requests; queued ones stay, and the engine continues as often as its limits
    allow. One fault too many, or a step that hangs, fails all requests and the engine for good: see `failed`.

    It implements `Engine` for callers in the same process; `put` and `serve` are for callers in another process.

    Args:
        variant: name of the variant.
        scheduler: plans the steps.
        runner: runs the steps on the device.
        device_thread: shared by the engines of one device, so that one step runs at a time.
        max_model_len: most tokens of a request.
        first_ids: tokens that every prompt must begin with, and else is put behind; not counted in max_model_len.
        max_waiting: most requests that may queue.
        dtype: name of the activations' float type.
        weight_bytes: size of the weights, for the metrics.
        limits: the faults it tolerates before it fails for good.
        grammars: compiles the grammars of requests; None if the engine accepts none.
        mask_s: see `GrammarLimits`.
    """

    def __init__(
        self,
        variant: str,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        device_thread: DeviceThread,
        max_model_len: int,
        first_ids: Sequence[int] = (),
        max_waiting: int = 1024,
        dtype: str = "float32",
        weight_bytes: int = 0,
        limits: FaultLimits = FaultLimits(),  # noqa: B008 (it is frozen)
        grammars: Grammars | None = None,
        mask_s: float = MASK_S,
    ) -> None:
        self.variant = variant
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.failed: Future[Exception] = Future()
        """Resolves to the fault that stopped the engine for good."""
        self.is_exhausted = False
        """Whether it failed because it had used up its restarts."""
        self._scheduler = scheduler
        self._runner = runner
        self._device_thread = device_thread
        self._weight_bytes = weight_bytes
        self._grammars = grammars
        self._restarts = Restarts(limits)
        self._masks = Masks(mask_s)
        self._inbox = Inbox(
            variant,
            scheduler,
            grammars=grammars,
            sink=self._deliver,
            read_others=self._read_others,
            masks=self._masks,
            first_ids=first_ids,
        )
        self._client = EngineClient(
            variant,
            self.put,
            self._compile,
            self.num_cached,
            # `submit` below checks the limit itself, because the inbox has the exact length of the queue.
            max_waiting=sys.maxsize,
            max_model_len=max_model_len,
            dtype=dtype,
        )
        self._max_waiting = max_waiting
        self._step_batch_sizes = [0] * (scheduler.max_num_requests + 1)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._wake = self._inbox.wake
        self._busy_poll: BusyPoll | None = None
        self._unread: deque[Unread] = deque()
        self._just_in_time = JustInTime()
        self._planned_s = 0.0
        self._lost: set[Request] = set()
        self._exchange: Exchange | None = None
        self._in_hand: InHand | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=f"engine-{variant}", daemon=True)
        self._watchdog = Watchdog(variant, limits.step_timeout_s, lambda: self._in_hand, self._give_up)

    def start(self) -> EngineLoop:
        self._thread.start()
        self._watchdog.start()
        return self

    def stop(self, timeout_s: float = 10.0, error: OttavaError | None = None) -> None:
        """End the thread after the step in flight; unfinished requests get the error. Idempotent."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        self._masks.close()
        self._end(error or EngineFailed(f"the engine of variant {self.variant!r} is stopping"))

    @property
    def failure(self) -> str | None:
        """See `Engine.failure`."""
        return describe(self.failed.result()) if self.failed.done() else None

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs. If so after `stop`, a step hangs."""
        return self._thread.is_alive()

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, arrival_s: float | None = None
    ) -> RequestStream:
        """Queue a request; called from a running event loop.

        Raises:
            QueueFull: max_waiting requests are queued.
            EngineFailed: the engine's thread has ended.
        """
        if self._inbox.is_closed:
            raise EngineFailed(f"the engine of variant {self.variant!r} has stopped")
        self._client.refuse_if_full(self._inbox.num_waiting, self._max_waiting, params.owner)
        self._event_loop = asyncio.get_running_loop()
        return self._client.submit(prompt_ids, params, request_id, arrival_s)

    async def compile(self, rules: str, num_answers: int = 1) -> None:
        """See `Engine.compile`."""
        await self._compile(rules, num_answers)

    async def num_cached(self, prompt_ids: list[int], salt: str) -> int:
        """See `Engine.num_cached`."""
        return self.count_cached(prompt_ids, salt)

    def count_cached(self, prompt_ids: list[int], salt: str) -> int:
        """See `Engine.num_cached`. Thread-safe."""
        with self._wake:
            return min(len(prompt_ids), self._scheduler.num_cached(self._inbox.begun(prompt_ids), salt))

    def put(self, command: Command) -> None:
        """Queue a command; its results go to the sink. Thread-safe."""
        self._inbox.put(command)

    def serve(self, sink: Sink, busy_poll: BusyPoll | None = None) -> None:
        """Send all news to this sink, and ask for commands by busy_poll before it sleeps.

        Call it before the first request.
        """
        self._inbox.sink = sink
        self._busy_poll = busy_poll

    def exchange(self, runner: StepRunner, num_blocks: int, weight_bytes: int, wait_s: float) -> Future[None]:
        """Replace the runner once all running requests have finished; queued requests start on the new one.

        Those that still run after wait_s seconds end with WeightsReplaced.

        Returns:
            A future that resolves when the new runner is in place; ReloadFailed if the engine ends before that.

        Raises:
            EngineFailed: the engine's thread has ended.
        """
        with self._wake:
            if self._inbox.is_closed:
                raise EngineFailed(f"the engine of variant {self.variant!r} has stopped")
            assert self._exchange is None, "one exchange at a time"
            until_s = time.perf_counter() + wait_s
            self._exchange = exchange = Exchange(runner, num_blocks, weight_bytes, wait_s, until_s)
            self._wake.notify()
        return exchange.done

    @property
    def has_work(self) -> bool:
        """Whether its thread has anything to do."""
        has_requests = bool(self._unread) or not self._scheduler.is_idle
        return has_requests or self._inbox.has_word or self._is_stopping or self._exchange is not None

    def stats(self) -> EngineStats:
        """See `Engine.stats`. Thread-safe."""
        gauges = self._inbox.gauges()
        return EngineStats(
            num_running=gauges.num_running,
            num_waiting=self._inbox.num_waiting,
            num_blocks=gauges.num_blocks,
            num_free_blocks=gauges.num_free_blocks,
            num_preemptions=gauges.num_preemptions,
            num_steps=sum(self._step_batch_sizes),
            weight_bytes=gauges.weight_bytes,
            kv_cache_bytes=gauges.kv_cache_bytes,
            step_batch_sizes=tuple(self._step_batch_sizes),
            num_restarts=gauges.num_restarts,
            num_graph_steps=gauges.num_graph_steps,
            num_plain_steps=gauges.num_plain_steps,
            num_padding_tokens=gauges.num_padding_tokens,
            num_late_steps=gauges.num_late_steps,
            num_draft_tokens=gauges.num_draft_tokens,
            num_accepted_tokens=gauges.num_accepted_tokens,
        )

    def news(self) -> News:
        """News with nothing but the current gauges."""
        return News(self.variant, self._inbox.gauges())

    def _deliver(self, news: News) -> None:
        """Pass news to the client on its event loop's thread."""
        event_loop = self._event_loop
        if event_loop is None or event_loop.is_closed():
            self._client.receive(news)
        else:
            event_loop.call_soon_threadsafe(self._client.receive, news)

    async def _compile(self, rules: str, num_answers: int) -> None:
        given_up: GivenUp = Future()
        try:
            await asyncio.to_thread(compiled, self._grammars, rules, num_answers, given_up)
        finally:
            given_up.set_result(None)

    def _read_others(self) -> tuple[int, int, int, int]:
        return self._restarts.total, self._weight_bytes, self._runner.kv_cache_bytes, self._just_in_time.num_late

    def _run(self) -> None:
        try:
            while (fault := self._turn_steps()) is not None and not self.failed.done():
                logger.error("a step of engine %s raised", self.variant, exc_info=fault)
                # Its frames hold the step and its requests, and it is kept until the next fault.
                fault = fault.with_traceback(None)
                if self._restarts.allows(fault, time.perf_counter()):
                    self._fail_running(fault)
                else:
                    self.is_exhausted = not is_poison(fault)
                    self._fail(fault)
        except Exception as error:
            logger.exception("engine %s cannot continue after a fault", self.variant)
            self._fail(error)
        finally:
            self._watchdog.stop()

    def _turn_steps(self) -> Exception | None:
        """Run steps until the engine is stopped (returns None) or one raises (returns what it raised)."""
        try:
            while self._wait_for_work():
                self._turn()
        except Exception as error:  # noqa: BLE001 (any exception of a step is a fault, which `_run` logs)
            return error
        return None

    def _wait_for_work(self) -> bool:
        """Sleep until there is work, then take in new commands. False if the engine is to stop.

        While a step runs there is work just before its end.
        """
        if self._busy_poll is not None and not self.has_work:
            self._busy_poll.ask()
        with self._wake:
            self._wait_for_arrivals()
            self._planned_s = time.perf_counter()
            check_after_s: float | None = CHECK_AFTER_S
            while not self.has_work:
                if not self._wake.wait(check_after_s):
                    self._scheduler.check_integrity()
                    check_after_s = None
            if not self._is_stopping:
                self._inbox.take_in()
                self._exchange_if_drained()
            return not self._is_stopping

    def _exchange_if_drained(self) -> None:
        self._scheduler.admits_new = self._exchange is None
        if self._exchange is None:
            return
        if not self._scheduler.is_drained and time.perf_counter() >= self._exchange.until_s:
            self._inbox.fail_started(
                WeightsReplaced(
                    f"new weights of variant {self.variant!r} had waited {self._exchange.wait_s:g} s for this request "
                    "to be done, which is the limit; send it again"
                )
            )
        if self._unread or not self._scheduler.is_drained:
            return
        exchange, self._exchange = self._exchange, None
        self._runner, self._weight_bytes = exchange.runner, exchange.weight_bytes
        self._just_in_time = JustInTime(self._just_in_time.num_late)
        self._scheduler.replace_pool(exchange.num_blocks)
        self._scheduler.admits_new = True
        exchange.done.set_result(None)

    def _turn(self) -> None:
        """Launch a step and read a finished one: the previous one if the device is asynchronous, else the same."""
        earlier = [each.handle for each in self._unread]
        self._masks.settle(MASKS_S)
        with self._wake:
            step = self._scheduler.schedule(time.perf_counter())
            self._inbox.note_scheduled(self._scheduler.admitted)
            self._scheduler.admitted = []
            only_launches = self._runner.only_launches
            if step is None or not only_launches:
                self._inbox.publish()
        if step is not None:
            self._launch(step, earlier)
            if only_launches:
                # Not before: the device need not wait until everyone has heard what is about to start.
                with self._wake:
                    self._inbox.publish()
        for _ in range(len(earlier) if self._runner.is_async else len(self._unread)):
            self._settle()
        if step is None and not earlier:
            self._masks.wait(IDLE_S)

    def _launch(self, step: Step, earlier: Sequence[Handle]) -> None:
        """Launch a step behind earlier ones that have not been read."""
        run = self._device_thread.launch if self._runner.only_launches else self._device_thread.run
        waiting = InHand("waiting to launch", step, time.perf_counter(), num_timeouts=2)
        handle = self._watched(waiting, run, self._execute, step)
        now_s = time.perf_counter()
        launch_s = now_s - self._planned_s if earlier else 0.0
        was_late = any(each.is_done for each in earlier)
        self._just_in_time.launched(now_s, launch_s, was_late=was_late)
        self._unread.append(Unread(step, handle, was_late))
        self._step_batch_sizes[step.num_requests] += 1

    def _execute(self, step: Step) -> Handle:
        """Launch a step now that the device is this engine's: its time counts from here."""
        self._in_hand = InHand("launching", step, time.perf_counter())
        return self._runner.execute(step)

    def _wait_for_arrivals(self) -> None:
        """Let a step run alone for as long as the device then need not wait: requests may come for the next one.

        They are taken in at once, so that their masks are made meanwhile. Called with the lock, which it lets go.
        """
        while self._unread and not self._is_stopping:
            running = self._unread[-1].handle
            wait_s = self._just_in_time.wait_s(running.shape, time.perf_counter())
            if not wait_s or running.is_done:
                return
            self._wake.wait(min(wait_s, LOOK_S))
            if self._inbox.has_word and not self._is_stopping:
                self._inbox.take_in()

    def _settle(self) -> None:
        """Read the oldest step's results and publish them, unless those of an earlier step were lost."""
        step, handle, was_late = self._unread.popleft()
        is_placed = False
        try:
            results = self._watched(InHand("reading", step, time.perf_counter()), handle.read)
            self._just_in_time.ended(results)
            if results.others_late and not was_late:
                self._just_in_time.was_late()
            if not self._lost:
                self._inbox.commit(step, results)
                is_placed = True
        finally:
            if not is_placed:
                self._lost.update(chunk.request for chunk in step.chunks)

    def _watched(self, in_hand: InHand, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function under the watchdog. Raises StepStuck if the watchdog has given up the step meanwhile."""
        self._in_hand = in_hand
        try:
            result = function(*args, **kwargs)
        finally:
            with self._wake:
                self._in_hand = None
        if self.failed.done():
            raise StepStuck("the step ended after it had been given up")
        return result

    def _fail_running(self, fault: Exception) -> None:
        """End the running requests, any of which may be the cause, and free what they held."""
        self._inbox.fail_running(
            self._salvage(),
            EngineFailed(
                f"a step of the engine of variant {self.variant!r} raised {type(fault).__name__}: the requests in it "
                "are lost and the engine goes on; send the request again"
            ),
        )

    def _salvage(self) -> set[Request]:
        """Publish the results of steps before the fault and wait for those after it. Returns the requests that lost."""
        while self._unread:
            try:
                self._settle()
            except Exception:
                logger.exception("engine %s: another step in flight is lost as well", self.variant)
        lost, self._lost = self._lost, set()
        return lost

    def _give_up(self, in_hand: InHand) -> bool:
        """Called by the watchdog: fail the engine, because the step will not end. False if it has ended after all."""
        with self._wake:
            if self._in_hand is not in_hand:
                return False
            stuck = StepStuck(f"stuck while {in_hand}")
            logger.critical("engine %s is %s\n%s", self.variant, stuck, stacks(self._thread.name))
            self._fail(stuck)
        return True

    def _fail(self, fault: Exception) -> None:
        """Fail the engine for good. Idempotent."""
        if not self.failed.done():
            self.failed.set_result(fault)
            self._end(EngineFailed(f"the engine of variant {self.variant!r} failed: {type(fault).__name__}"))

    def _end(self, error: OttavaError) -> None:
        with self._wake:
            self._is_stopping = True
            self._inbox.close(error)
            exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.done.set_exception(ReloadFailed(f"the engine ended before the exchange: {error.message}"))
