"""What an engine does about a step that raises or does not end: how often it goes on, and who watches the clock."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.engine.device.device_thread import DEVICE_THREAD
from service.engine.scheduler import Step

POISON = ("CUDA error", "Triton Error [CUDA]")
"""In the message of an error after which no call of the process reaches the GPU any more."""

MAX_NAMED = 8
"""Requests of a stuck step that the log names."""

logger = logging.getLogger(__name__)


class StepStuck(RuntimeError):
    """A step has not ended within its time, and may never."""


@dataclass(frozen=True, slots=True)
class FaultLimits:
    """What an engine bears before it stays failed.

    max_restarts: times that it goes on after a step has raised, within window_s seconds.
    step_timeout_s: after which a step that has not ended is stuck.
    """

    max_restarts: int = 3
    window_s: float = 600.0
    step_timeout_s: float = 120.0


class Restarts:
    """Counts restarts and says whether another is allowed."""

    def __init__(self, limits: FaultLimits) -> None:
        self._limits = limits
        self._times_s: deque[float] = deque()
        self.total = 0

    def allows(self, fault: Exception, now_s: float) -> bool:
        """Take note of a fault: True where the engine may go on."""
        while self._times_s and now_s - self._times_s[0] >= self._limits.window_s:
            self._times_s.popleft()
        if is_poison(fault) or len(self._times_s) >= self._limits.max_restarts:
            return False
        self._times_s.append(now_s)
        self.total += 1
        return True


def is_poison(fault: BaseException) -> bool:
    """Whether the GPU is lost to this process: every later call would raise the same."""
    is_accelerators = any(kind.__name__ == "AcceleratorError" for kind in type(fault).__mro__)
    return is_accelerators or (isinstance(fault, RuntimeError) and any(text in str(fault) for text in POISON))


def describe(fault: BaseException) -> str:
    """A fault in a word and a line."""
    return f"{type(fault).__name__}: {fault}"


@dataclass(frozen=True, slots=True)
class InHand:
    """A step that a thread waits for. doing: "launching" or "reading"; since_s: by `time.perf_counter`."""

    doing: str
    step: Step
    since_s: float

    def __str__(self) -> str:
        chunks = self.step.chunks
        names = [chunk.request.id for chunk in chunks[:MAX_NAMED]] + ["..."] * (len(chunks) > MAX_NAMED)
        kind = "decode" if self.step.is_decode else "prefill"
        return (
            f"{self.doing} a {kind} step of {self.step.num_tokens} tokens for {len(chunks)} requests "
            f"({', '.join(names)}), for {time.perf_counter() - self.since_s:.1f} s"
        )


class Watchdog:
    """A thread that notices a step which does not end.

    It sleeps until the step in hand would be late, or for the whole limit where there is none: a step that begins
    while it sleeps cannot be late before it wakes. So it costs a step nothing.

    Args:
        name: of the engine.
        timeout_s: after which a step is stuck.
        look: what is in hand, from any thread.
        give_up: called once with what is stuck; False if that ended meanwhile after all.
    """

    def __init__(
        self, name: str, timeout_s: float, look: Callable[[], InHand | None], give_up: Callable[[InHand], bool]
    ) -> None:
        self._timeout_s = timeout_s
        self._look = look
        self._give_up = give_up
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watchdog-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._has_ended.set()

    def _run(self) -> None:
        pause_s = self._timeout_s
        while not self._has_ended.wait(pause_s):
            in_hand = self._look()
            left_s = 0.0 if in_hand is None else in_hand.since_s + self._timeout_s - time.perf_counter()
            pause_s = left_s if left_s > 0 else self._timeout_s
            if in_hand is not None and left_s <= 0 and self._give_up(in_hand):
                return


def stacks(*names: str) -> str:
    """Where the threads of these names, and the one that computes, stand now."""
    frames = sys._current_frames()
    found = [thread for thread in threading.enumerate() if thread.name in (*names, DEVICE_THREAD)]
    return "\n".join(
        f"{thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident]))
        for thread in found
        if thread.ident in frames
    )
