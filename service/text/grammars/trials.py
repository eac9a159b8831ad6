"""Starts trials of grammars, and waits for their verdicts; what a trial does is in `trial_process`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from service.engine.grammar import GivenUp, GrammarLimits
from service.errors import EngineFailed
from service.text.grammars.trial_process import Order, Verdict, Vocabulary, receive, send, serve

COMMAND = (sys.executable, "-m", "service.text.grammars.trial_process")
MAX_FILES = 1 << 20
ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class TrialParent:
    """The process that trials are forked from. end: our end of its socket pair; when it is closed the process ends."""

    end: socket.socket
    pid: int
    process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End the process, if it has not ended."""
        self.end.close()
        if self.process is not None:
            self.process.wait()
            return
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def forked_parent() -> TrialParent:
    """Fork a parent of trials off this process, whose imports it shares.

    Call it before the process has threads or uses a GPU.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        # Above all our end of the channel: while a copy of it is open, the web does not see the engine die.
        keep = theirs.fileno()
        os.closerange(3, keep)
        os.closerange(keep + 1, MAX_FILES)
        serve(theirs)
    theirs.close()
    return TrialParent(ours, pid)


def spawned_parent() -> TrialParent:
    """Start a parent of trials, which takes seconds to import what it needs."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: S603
            [*COMMAND, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
    return TrialParent(ours, process.pid, process)


class Trials:
    """Compiles rules on trial, each in a process of its own.

    Args:
        vocabulary: returns what to compile for; called once.
        limits: what a trial may take.
        parent: the process that trials are forked from; None: started on first use. One that dies is replaced.
    """

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], limits: GrammarLimits, parent: TrialParent | None = None
    ) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        self._parent = parent
        self._knows_vocabulary = False
        self._starting = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process that trials are forked from, once it has been started."""
        return None if self._parent is None else self._parent.pid

    def run(self, rules: str, given_up: GivenUp) -> Verdict | None:
        """What became of a trial; None if it exceeded a limit, or was given up. Blocks.

        Raises:
            EngineFailed: no trial can be started.
        """
        order = msgspec.msgpack.encode(Order(rules, self._limits.compile_s, self._limits.compile_bytes))
        for _ in range(ATTEMPTS):
            ours, theirs = socket.socketpair()
            with ours, suppress(EOFError, OSError):
                with theirs:
                    self._pass(theirs)
                given_up.add_done_callback(lambda _, link=ours: _hang_up(link))  # type: ignore[misc]
                send(ours, order)
                # The trial has begun, so if it ends without a verdict its limits are why.
                receive(ours)
                try:
                    return msgspec.msgpack.decode(receive(ours), type=Verdict)
                except (EOFError, OSError):
                    return None
            if given_up.done():
                return None
        raise EngineFailed("no process could be started to compile a grammar in; see the engine's log")

    def close(self) -> None:
        """End the processes."""
        with self._starting:
            self._drop()

    def _pass(self, theirs: socket.socket) -> None:
        """Pass a trial its end. Starts the parent of trials, or another one if it has died."""
        with self._starting:
            if self._parent is not None and _is_gone(self._parent.end):
                self._drop()
            if self._parent is None:
                self._parent = spawned_parent()
            if not self._knows_vocabulary:
                send(self._parent.end, msgspec.msgpack.encode(self._vocabulary()))
                self._knows_vocabulary = True
            socket.send_fds(self._parent.end, [b"t"], [theirs.fileno()])

    def _drop(self) -> None:
        if self._parent is not None:
            self._parent.close()
        self._parent, self._knows_vocabulary = None, False


def _is_gone(end: socket.socket) -> bool:
    try:
        return not end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _hang_up(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
