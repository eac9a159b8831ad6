"""The web's side of the engines, wherever these run: opened, checked, started again where they die."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from service.engine.api import HostInfo, Reloaded, Stage
from service.engine.client import EngineClient
from service.engine.messages import Command, News, error_of
from service.engine.supervision import FaultLimits, Restarts
from service.errors import EngineFailed, NotReady, OttavaError, StartupError
from service.host.channel.messages import Call, Failed, Opened, Refused, Returned, Staged, ToEngine, ToWeb
from service.text.protocols import TokenizerLike

STARTING = Stage("starting the engine")
CHECKING = Stage("the start-up self-check is still running")
STOP_S = 2.0
"""For the engines to end by themselves; after that they are ended."""

log = logging.getLogger(__name__)


class Link(Protocol):
    """A way to engines, for as long as these live.

    can_renew: once they are gone, others can take their place.
    """

    can_renew: bool

    async def open(self, receive: Callable[[ToWeb], None], on_gone: Callable[[str], None]) -> None:
        """Start engines.

        Args:
            receive: takes their messages, on the event loop's thread.
            on_gone: called there once they are gone, with why.
        """
        ...

    def send(self, message: ToEngine) -> None:
        """Must not wait."""
        ...

    async def close(self, timeout_s: float) -> None:
        """End the engines; those that have not ended after timeout_s, by force where that can be."""
        ...


class Watch(Protocol):
    """Who is told how the start-up goes."""

    def on_stage(self, stage: Stage) -> None: ...

    def on_open(self, info: HostInfo) -> None: ...


class HostClient:
    """See `service.web.state.Host`.

    Args:
        variants: that are served, the default one first.
        link: to their engines.
        load_tokenizer: of a folder; takes up to a second, and is called on a thread.
        limits: how often engines that died are replaced.
        max_waiting: requests that may queue for a variant.
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
            name: EngineClient(name, self._post, self._compile, max_waiting=max_waiting, is_open=False)
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
        """Whether the engines are to end."""
        return self._is_closing

    @property
    def info(self) -> HostInfo:
        """What is served. Raises NotReady before that is known."""
        if self._info is None:
            raise self._not_ready()
        return self._info

    @property
    def tokenizer(self) -> TokenizerLike:
        """Of the model. Raises NotReady before it is loaded."""
        if self._tokenizer is None:
            raise self._not_ready()
        return self._tokenizer

    def run(self) -> Coroutine[Any, Any, None]:
        """Open the engines and check them, again where they die; done once they are closed or failed for good.

        An application can be started again after it has ended, and so can its host.
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
        """Serve the checkpoint of a folder, None for the present one's. Raises ReloadFailed: the old one serves on."""
        returned = await self._call("reload", model)
        assert returned.reloaded is not None
        self._info = returned.info
        # It has passed the check that the one before may have failed.
        self.refused = {name: why for name, why in self.refused.items() if name != returned.reloaded.variant}
        return returned.reloaded

    async def close(self, error: OttavaError) -> None:
        """End the engines; requests that are still there get the error. Idempotent."""
        if not self._is_closing:
            self._is_closing = True
            for engine in self.engines.values():
                # Who asks from here on is refused, since nobody would answer.
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
        await self._link.open(self._receive, partial(_settle, self._gone))
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
        if self._watch is not None:
            self._watch.on_open(opened.info)
        self._set_stage(CHECKING)

    async def _watched(self) -> str:
        """Check the engines, let those that wait go on, and return why they are gone once they are."""
        assert self._gone is not None
        try:
            returned = await self._call("check")
            self.refused = returned.refused or {}
        except OttavaError as error:
            if not self._gone.done():
                log.error("the self-check raised: no variant becomes ready")  # noqa: TRY400 (its trace is the engine's)
                self.refused = dict.fromkeys(self.engines, f"the self-check raised: {error.message}")
        for variant, reason in self.refused.items():
            log.error("variant %s refused by the self-check: %s", variant, reason)
        if not self._gone.done():
            self.stage = None
            for engine in self.engines.values():
                engine.resume()
        return await self._gone

    async def _renew(self, why: str) -> bool:
        """Tell those that ran, and end what is left of the engines; False where there is no other try."""
        fault = EngineFailed(f"the engine's process is gone: {why}")
        is_allowed = self._link.can_renew and self._restarts.allows(fault, time.perf_counter())
        said = "it is started again" if is_allowed else "it is not started again"
        log.error("the engine is gone, %s: %s", said, why)
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
        """An engine has failed for good: with another process it may go on."""
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
        """All engines have failed for good: their requests are told the error, whoever runs the server is told why."""
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

    async def _compile(self, rules: str) -> None:
        await self._call("compile", rules)

    async def _call(self, kind: Literal["compile", "check", "reload"], argument: str | None = None) -> Returned:
        """Wait for what a call comes to. Raises what it raised, and EngineFailed where the engine is gone."""
        if self._gone is None or self._gone.done():
            raise EngineFailed("the engine is gone")
        number = next(self._numbers)
        done: asyncio.Future[Returned] = asyncio.get_running_loop().create_future()
        self._calls[number] = done
        self._link.send(Call(number, kind, argument))
        returned = await done
        if returned.fault is not None:
            raise error_of(returned.fault)
        return returned

    def _not_ready(self) -> NotReady:
        return NotReady(f"the server is not ready: {self.stage or STARTING}")


def _settle(future: asyncio.Future[Any] | None, value: object) -> None:
    if future is not None and not future.done():
        future.set_result(value)
