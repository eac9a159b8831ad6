"""The engines' side of the channel: opens a host, passes it the web's messages, and sends its answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

import torch

from quant.errors import QuantError
from service.busy_poll import BusyPoll
from service.engine.api import HostInfo, Reloaded, Stage
from service.engine.grammar import GivenUp, Grammars, compiled
from service.engine.messages import Command, Fault, Finish, News, Sink, Submit, fault_of
from service.engine.supervision import StepStuck, describe
from service.errors import OttavaError, ReloadFailed, StartupError
from service.host.channel.messages import (
    Abandon,
    Call,
    EngineFacts,
    Failed,
    Opened,
    Refused,
    Returned,
    Staged,
    Stop,
    ToEngine,
    ToWeb,
)
from service.host.channel.socket import ThreadEnd
from service.process import end_process, settle, start_thread
from service.store.progress import Progress

USERS = (StartupError, QuantError, OSError, torch.OutOfMemoryError)
"""Errors of opening that the user can fix; reported in one line without a traceback."""

STOP_S = 1.0
"""Time for the current step to end before the process exits anyway."""

Reload = Callable[[str | None], Reloaded]
"""Reloads from a checkpoint folder, or from the present one if None. Blocks until done; raises ReloadFailed."""

logger = logging.getLogger(__name__)


Take = Callable[[Callable[[ToEngine], None]], object]


def nothing_to_reload(_model: str | None) -> Reloaded:
    """A `Reload` that always fails, for engines without a checkpoint."""
    raise ReloadFailed("the engines of this server hold no checkpoint that could be reloaded")


class ServedEngine(Protocol):
    """The engine's interface used here: `service.engine.loop.EngineLoop`, or a fake in tests."""

    variant: str
    max_model_len: int
    dtype: str
    failed: Future[Exception]

    @property
    def is_exhausted(self) -> bool: ...

    @property
    def has_work(self) -> bool: ...

    def put(self, command: Command) -> None: ...

    def serve(self, sink: Sink, busy_poll: BusyPoll | None = None) -> None: ...

    def count_cached(self, prompt_ids: list[int], salt: str) -> int: ...

    def news(self) -> News: ...


class ServedHost(Protocol):
    """The host's interface used here: `service.host.model_host.ModelHost`, or a fake in tests."""

    @property
    def engines(self) -> Mapping[str, ServedEngine]: ...

    @property
    def tokenizer_folder(self) -> Path: ...

    @property
    def grammars(self) -> Grammars | None: ...

    @property
    def reload(self) -> Reload: ...

    @property
    def busy_poll_s(self) -> float: ...

    def info(self) -> HostInfo: ...

    def self_check(self) -> Mapping[str, str]: ...

    def stop(self, timeout_s: float = 10.0) -> None: ...


class HostServer:
    """Serves one host to one web.

    Args:
        open_host: loads the host; called by `open`.
        send: sends a message to the web; must not block.
        take: passes the web's messages that have come to a function, without waiting for one; None if they are passed
            to `receive` by themselves. May be called by an engine that has nothing else to do.
    """

    def __init__(
        self, open_host: Callable[[Progress], ServedHost], send: Callable[[ToWeb], None], take: Take | None = None
    ) -> None:
        self._open_host = open_host
        self._send = send
        self._take = take
        self._host: ServedHost | None = None
        self._calls: dict[int, GivenUp] = {}
        self.stopped: Future[None] = Future()
        """Set when the web sends `Stop`."""

    def open(self) -> bool:
        """Load the host and send `Opened`. If that fails, send `Refused` and return False."""
        try:
            host = self._open_host(self._on_progress)
        except USERS as error:
            self._send(Refused(fault_told(error), is_told=True))
            return False
        except Exception as error:
            logger.exception("the engine could not be started")
            self._send(Refused(Fault("StartupError", f"{type(error).__name__}: {error}"), is_told=False))
            return False
        self._host = host
        facts = [EngineFacts(name, engine.max_model_len, engine.dtype) for name, engine in host.engines.items()]
        busy_poll = self._busy_poll(host)
        for engine in host.engines.values():
            engine.serve(self._send, busy_poll)
            engine.failed.add_done_callback(lambda failed, engine=engine: self._tell_failure(engine, failed.result()))  # type: ignore[misc]
        self._send(
            Opened(host.info(), str(host.tokenizer_folder), facts, 0.0 if busy_poll is None else host.busy_poll_s)
        )
        for engine in host.engines.values():
            self._send(engine.news())
        return True

    def receive(self, message: ToEngine) -> None:
        """Handle a message of the web without blocking. Called on the thread that reads them."""
        if isinstance(message, Stop):
            if not self.stopped.done():
                self.stopped.set_result(None)
        elif self._host is None:
            raise RuntimeError(f"{type(message).__name__} came before the host was open")
        elif isinstance(message, Call):
            given_up = self._calls[message.number] = Future()
            start_thread(message.kind, self._answer, self._host, message, given_up)
        elif isinstance(message, Abandon):
            if message.number in self._calls:
                self._calls.pop(message.number).set_result(None)
        elif isinstance(message, (Submit, Finish)):
            self._host.engines[message.variant].put(message)

    def stop(self, timeout_s: float) -> None:
        """Stop the engines."""
        if self._host is not None:
            self._host.stop(timeout_s)

    def _busy_poll(self, host: ServedHost) -> BusyPoll | None:
        """None without a `take`: engines and web share an interpreter then, and nobody must poll beside their work."""
        if self._take is None:
            return None
        engines = tuple(host.engines.values())
        return BusyPoll(partial(self._take, self.receive), lambda: any(map(_works, engines)), host.busy_poll_s)

    def _on_progress(self, name: str, done: int, total: int, detail: str = "", /) -> None:
        self._send(Staged(Stage(name, done, total, detail)))

    def _answer(self, host: ServedHost, call: Call, given_up: GivenUp) -> None:
        try:
            self._send(_done(host, call, given_up))
        except OttavaError as error:
            self._send(Returned(call.number, fault_of(error)))
        except Exception as error:
            logger.exception("%s failed", call.kind)
            # Clients may see the error of a reload or a grammar, but only operators that of the self-check.
            said = describe(error) if call.kind == "check" else "internal error; the engine's log has it"
            self._send(Returned(call.number, Fault(OttavaError.__name__, said)))
        finally:
            self._calls.pop(call.number, None)

    def _tell_failure(self, engine: ServedEngine, error: Exception) -> None:
        is_stuck = isinstance(error, StepStuck)
        self._send(Failed(engine.variant, describe(error), engine.is_exhausted, is_stuck))


def fault_told(error: BaseException) -> Fault:
    """Encode an error of opening; any that is not a StartupError becomes one."""
    if isinstance(error, StartupError):
        return fault_of(error)
    return Fault("StartupError", str(error))


def _done(host: ServedHost, call: Call, given_up: GivenUp) -> Returned:
    """Run a call; its exceptions propagate."""
    if call.kind == "check":
        return Returned(call.number, refused=dict(host.self_check()), info=host.info())
    if call.kind == "reload":
        reloaded = host.reload(call.argument)
        return Returned(call.number, reloaded=reloaded, info=host.info())
    if call.kind == "cached":
        engine = host.engines[call.variant]
        return Returned(call.number, num_cached=engine.count_cached(call.prompt_ids, call.argument or ""))
    compiled(host.grammars, call.argument or "", call.num_answers, given_up)
    return Returned(call.number)


def run(server: HostServer, channel: ThreadEnd[ToEngine]) -> NoReturn:
    """Open the server's host and serve it until the web sends `Stop` or exits."""
    start_thread("channel", _read, channel, server)
    if not server.open():
        # The web must read why before it reads the end of the stream, so wait for its `Stop`.
        server.stopped.result()
        end_process(1)
    settle()
    server.stopped.result()
    server.stop(STOP_S)
    end_process(0)


def _works(engine: ServedEngine) -> bool:
    return engine.has_work and not engine.failed.done()


def _read(channel: ThreadEnd[ToEngine], server: HostServer) -> None:
    with _ends_unread():
        channel.read_all(server.receive)
    end_process(0)


def take_in(channel: ThreadEnd[ToEngine], receive: Callable[[ToEngine], None]) -> None:
    """Pass on the web's messages that have come."""
    with _ends_unread():
        channel.take(receive)


@contextmanager
def _ends_unread() -> Iterator[None]:
    """Ends the process if messages cannot be read: requests would never end. After an exit it is restarted."""
    try:
        yield
    except Exception:
        logger.exception("the engine cannot read the web's messages")
        end_process(1)
