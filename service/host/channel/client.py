"""The web's side of the channel: opens the engines, checks them, and restarts them if they die."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from service.busy_poll import PollingEventLoop
from service.engine.api import HostInfo, Reloaded, Stage
from service.engine.client import EngineClient
from service.engine.messages import Command, News, error_of
from service.engine.supervision import FaultLimits, Restarts
from service.errors import EngineFailed, NotReady, OttavaError, StartupError
from service.host.channel.messages import (
    Abandon,
    Call,
    CallKind,
    Failed,
    Opened,
    Refused,
    Returned,
    Staged,
    ToEngine,
    ToWeb,
)
from service.text.protocols import TokenizerLike

STARTING = Stage("starting the engine")
CHECKING = Stage("the start-up self-check is still running")
STOP_S = 2.0
"""Time for the engines to stop by themselves before they are killed."""

log = logging.getLogger(__name__)


class Link(Protocol):
    """A connection to engines that it starts.

    can_renew: whether `open` can start new engines after the old ones have died.
    pid: of the engines' process; None if there is none, or they are in this one.
    """

    can_renew: bool

    @property
    def pid(self) -> int | None: ...

    async def open(self, receive: Callable[[ToWeb], None], on_gone: Callable[[str], None]) -> None:
        """Start engines.

        Args:
            receive: called with each of their messages, on the event loop's thread.
            on_gone: called on the same thread once they have died, with the reason.
        """
        ...

    def send(self, message: ToEngine) -> None:
        """Send a message without blocking."""
        ...

    async def close(self, timeout_s: float) -> None:
        """Stop the engines, by force after timeout_s if the link can do that."""
        ...


class Watch(Protocol):
    """Callbacks for the progress of start-up."""

    def on_stage(self, stage: Stage) -> None: ...

    def on_open(self, info: HostInfo) -> None: ...


class HostClient:
    """Implements `service.web.state.Host`.

    Args:
        variants: names of the served variants, the default one first.
        link: connection to their engines.
        load_tokenizer: loads the tokenizer of a folder; takes up to a second, so it is called on a thread.
        limits: how often engines that died are restarted.
        max_waiting: most requests that may queue for a variant.
        watch: notified of the progress of start-up.
    """

    def __init__(
        self,
        variants: Sequence[str],
        link: Link,
        *,
        load_tokenizer: Callable[[Path], TokenizerLike],
        limits: FaultLimits,
        max_waiting: int,
        watch: Watch | None = None,
    ) -> None:
        self.engines: Mapping[str, EngineClient] = {
            name: EngineClient(
                name,
                self._post,
                self._compile,
                partial(self._count_cached, name),
                max_waiting=max_waiting,
                is_open=False,
            )
            for name in variants
        }
        self.stage: Stage | None = STARTING
        self.refused: Mapping[str, str] = {}
        self.failure: OttavaError | None = None
        self.failed = asyncio.Event()
        self.is_stuck = False
        self._link = link
        self._load_tokenizer = load_tokenizer
        self._restarts = Restarts(limits)
        self._watch = watch
        self._info: HostInfo | None = None
        self._tokenizer: TokenizerLike | None = None
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Returned]] = {}
        self._opened: asyncio.Future[Opened] | None = None
        self._gone: asyncio.Future[str] | None = None
        self._is_closing = False

    def closes(self) -> bool:
        """Whether `close` has been called."""
        return self._is_closing

    @property
    def info(self) -> HostInfo:
        """What is served. Raises NotReady before the engines are open."""
        if self._info is None:
            raise self._not_ready()
        return self._info

    @property
    def tokenizer(self) -> TokenizerLike:
        """The model's tokenizer. Raises NotReady before it is loaded."""
        if self._tokenizer is None:
            raise self._not_ready()
        return self._tokenizer

    @property
    def engine_pid(self) -> int | None:
        """The process of the engines; None while there is none, or if they are in this one."""
        return self._link.pid

    def run(self) -> Coroutine[Any, Any, None]:
        """Open and check the engines, and restart them if they die. Ends when they are closed or have failed for good.

        May be called again after `close`, because an application can be started again after its shutdown.
        """
        if self._is_closing:
            self._is_closing, self.failure = False, None
            self.failed.clear()
            for engine in self.engines.values():
                engine.reopen()
        return self._run()

    async def _run(self) -> None:
        is_first = True
        while not self.closes():
            try:
                await self._start()
                why = await self._watched()
            except StartupError as error:
                if self.closes():
                    return
                if is_first:
                    self._fail(error, error.message)
                    return
                why = error.message
            if self.closes() or not await self._renew(why):
                return
            is_first = False

    async def reload(self, model: str | None) -> Reloaded:
        """Reload from a checkpoint folder, or from the present one if None.

        Raises:
            ReloadFailed: the checkpoint cannot be served; the old weights stay in use.
            EngineFailed: the engine has died.
        """
        returned = await self._call("reload", model)
        assert returned.reloaded is not None
        self._info = returned.info
        # The new weights have passed the self-check, which the old ones may have failed.
        self.refused = {name: why for name, why in self.refused.items() if name != returned.reloaded.variant}
        return returned.reloaded

    async def close(self, error: OttavaError) -> None:
        """Stop the engines; unfinished requests get the error. Idempotent."""
        if not self._is_closing:
            self._is_closing = True
            for engine in self.engines.values():
                # Also refuses later requests, which no engine would answer.
                engine.fail("it was closed", error)
            self._fail_calls(error)
            await self._link.close(STOP_S)
            if self._gone is not None and not self._gone.done():
                self._gone.set_result("it was closed")

    async def _start(self) -> None:
        """Open engines and check them. Raises StartupError."""
        loop = asyncio.get_running_loop()
        self._opened, self._gone = loop.create_future(), loop.create_future()
        self._set_stage(STARTING)
        try:
            await self._link.open(self._receive, partial(_settle, self._gone))
        except OSError as error:
            raise StartupError(f"the engine cannot be started: {error}") from error
        first: set[asyncio.Future[Any]] = {self._opened, self._gone}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not self._opened.done():
            raise StartupError(f"the engine ended while it started: {self._gone.result()}")
        opened = self._opened.result()
        self._tokenizer = await asyncio.to_thread(self._load_tokenizer, Path(opened.tokenizer_folder))
        self._info = opened.info
        for facts in opened.engines:
            engine = self.engines[facts.variant]
            engine.max_model_len, engine.dtype = facts.max_model_len, facts.dtype
        if isinstance(loop, PollingEventLoop):
            loop.busy_poll_s = opened.busy_poll_s
        if self._watch is not None:
            self._watch.on_open(opened.info)
        self._set_stage(CHECKING)

    async def _watched(self) -> str:
        """Check the engines, send them the queued requests, and return the reason once they have died."""
        assert self._gone is not None
        try:
            returned = await self._call("check")
            self.refused, self._info = returned.refused or {}, returned.info
        except OttavaError as error:
            if not self._gone.done():
                log.error("the self-check raised: no variant becomes ready")  # noqa: TRY400 (the engine logs the trace)
                self.refused = dict.fromkeys(self.engines, f"the self-check raised: {error.message}")
        for variant, reason in self.refused.items():
            log.error("variant %s refused by the self-check: %s", variant, reason)
        if not self._gone.done():
            self.stage = None
            for engine in self.engines.values():
                engine.resume()
        return await self._gone

    async def _renew(self, why: str) -> bool:
        """Fail the started requests and clean up after the engines died. False if they may not be restarted."""
        fault = EngineFailed(f"the engine's process is gone: {why}")
        is_allowed = self._link.can_renew and self._restarts.allows(fault, time.perf_counter())
        said = "restarting it" if is_allowed else "it will not be restarted"
        log.error("the engine died, %s: %s", said, why)
        self._fail_calls(fault)
        if not is_allowed:
            self._fail(EngineFailed("the engine has failed for good: this request is lost"), why)
            return False
        self._set_stage(Stage("starting the engine again"))
        for engine in self.engines.values():
            engine.lost(
                EngineFailed(
                    f"the engine of variant {engine.variant!r} died: the requests in it are lost and it is started "
                    "again; send the request again"
                )
            )
        await self._link.close(0.0)
        return True

    def _receive(self, message: ToWeb) -> None:
        if isinstance(message, News):
            self.engines[message.variant].receive(message)
        elif isinstance(message, Staged):
            self._set_stage(message.stage)
        elif isinstance(message, Returned):
            call = self._calls.pop(message.number, None)
            if call is not None and not call.done():
                call.set_result(message)
        elif isinstance(message, Opened):
            _settle(self._opened, message)
        elif isinstance(message, Refused):
            if self._opened is not None and not self._opened.done():
                self._opened.set_exception(error_of(message.fault))
        elif isinstance(message, Failed):
            self._on_failure(message)

    def _on_failure(self, message: Failed) -> None:
        """Handle an engine that has failed for good: restart the process if that may help."""
        if message.is_exhausted or not self._link.can_renew:
            engine = self.engines[message.variant]
            self.is_stuck = message.is_stuck
            engine.fail(
                message.failure,
                EngineFailed(f"the engine of variant {message.variant!r} failed: {message.failure.partition(':')[0]}"),
            )
            self._fail_for_good(EngineFailed(message.failure))
        else:
            _settle(self._gone, message.failure)

    def _fail(self, error: OttavaError, why: str) -> None:
        """Fail all engines for good: requests get the error; why is what operators see."""
        for engine in self.engines.values():
            engine.fail(why, error)
        self._fail_for_good(error)

    def _fail_for_good(self, error: OttavaError) -> None:
        self.failure = self.failure or error
        self.failed.set()

    def _fail_calls(self, error: OttavaError) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.done():
                call.set_exception(error)

    def _set_stage(self, stage: Stage) -> None:
        self.stage = stage
        if self._watch is not None:
            self._watch.on_stage(stage)

    def _post(self, command: Command) -> None:
        self._link.send(command)

    async def _compile(self, rules: str, num_answers: int) -> None:
        await self._call("compile", rules, num_answers=num_answers)

    async def _count_cached(self, variant: str, prompt_ids: list[int], salt: str) -> int:
        return (await self._call("cached", salt, variant=variant, prompt_ids=prompt_ids)).num_cached

    async def _call(
        self,
        kind: CallKind,
        argument: str | None = None,
        *,
        variant: str = "",
        prompt_ids: Sequence[int] = (),
        num_answers: int = 1,
    ) -> Returned:
        """Send a call and wait for its result. Raises what the call raised, or EngineFailed if the engine has died."""
        if self._gone is None or self._gone.done():
            raise EngineFailed("the engine is gone")
        if self._opened is None or not self._opened.done():
            raise EngineFailed("the engine is starting again; send the request again")
        number = next(self._numbers)
        done: asyncio.Future[Returned] = asyncio.get_running_loop().create_future()
        self._calls[number] = done
        self._link.send(Call(number, kind, argument, variant, list(prompt_ids), num_answers))
        try:
            returned = await done
        except asyncio.CancelledError:
            self._calls.pop(number, None)
            self._link.send(Abandon(number))
            raise
        if returned.fault is not None:
            raise error_of(returned.fault)
        return returned

    def _not_ready(self) -> NotReady:
        return NotReady(f"the server is not ready: {self.stage or STARTING}")


def _settle(future: asyncio.Future[Any] | None, value: object) -> None:
    if future is not None and not future.done():
        future.set_result(value)
