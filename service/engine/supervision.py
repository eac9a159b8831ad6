"""Limits on an engine's restarts after faults, and the watchdog for steps that hang."""

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
"""Texts in the message of an error after which the process can no longer use the GPU."""

MAX_NAMED = 8
"""Most requests of a stuck step that are named in the log."""

logger = logging.getLogger(__name__)


class StepStuck(RuntimeError):
    """A step has exceeded its time limit and may never end."""


@dataclass(frozen=True, slots=True)
class FaultLimits:
    """The faults that an engine tolerates before it fails for good.

    max_restarts: how often within window_s seconds it continues after a step has raised.
    step_timeout_s: time after which a step counts as stuck; see `InHand`.
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
        """Record a fault. Returns whether the engine may continue, which counts as a restart."""
        while self._times_s and now_s - self._times_s[0] >= self._limits.window_s:
            self._times_s.popleft()
        if is_poison(fault) or len(self._times_s) >= self._limits.max_restarts:
            return False
        self._times_s.append(now_s)
        self.total += 1
        return True


def is_poison(fault: BaseException) -> bool:
    """Whether the process can no longer use the GPU, so that every later call would raise the same."""
    is_accelerators = any(kind.__name__ == "AcceleratorError" for kind in type(fault).__mro__)
    return is_accelerators or (isinstance(fault, RuntimeError) and any(text in str(fault) for text in POISON))


def describe(fault: BaseException) -> str:
    """Class and message of a fault, for logs."""
    return f"{type(fault).__name__}: {fault}"


@dataclass(frozen=True, slots=True)
class InHand:
    """A step that the engine's thread is waiting for.

    doing: "waiting to launch", "launching" or "reading".
    since_s: `time.perf_counter`.
    num_timeouts: after how many time limits of a step it counts as stuck. Two while it waits for the device: if
        another engine's step has it and hangs there, that one's watchdog finds it first.
    """

    doing: str
    step: Step
    since_s: float
    num_timeouts: int = 1

    def __str__(self) -> str:
        requests = list(dict.fromkeys(chunk.request for chunk in self.step.chunks))
        names = [request.id for request in requests[:MAX_NAMED]] + ["..."] * (len(requests) > MAX_NAMED)
        kind = "decode" if self.step.is_decode else "prefill"
        return (
            f"{self.doing} a {kind} step of {self.step.num_tokens} tokens for {len(requests)} requests "
            f"({', '.join(names)}), for {time.perf_counter() - self.since_s:.1f} s"
        )


class Watchdog:
    """A thread that detects a step which hangs.

    It sleeps until the current step would exceed the limit, or for the whole limit if there is no step. A step that
    begins meanwhile cannot exceed the limit before the thread wakes, so steps need not notify it and it costs nothing.

    Args:
        name: name of the engine.
        timeout_s: time after which a step counts as stuck.
        look: returns the current step; thread-safe.
        give_up: called with a stuck step; returns False if the step has ended meanwhile, and watching continues.
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
            left_s = 0.0
            if in_hand is not None:
                left_s = in_hand.since_s + in_hand.num_timeouts * self._timeout_s - time.perf_counter()
            pause_s = min(left_s, self._timeout_s) if left_s > 0 else self._timeout_s
            if in_hand is not None and left_s <= 0 and self._give_up(in_hand):
                return
            # It holds the step's requests, which must not live on while this thread sleeps.
            del in_hand


def stacks(*names: str) -> str:
    """The current stack traces of the named threads and the device thread."""
    frames = sys._current_frames()
    found = [thread for thread in threading.enumerate() if thread.name in (*names, DEVICE_THREAD)]
    return "\n".join(
        f"{thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident]))
        for thread in found
        if thread.ident in frames
    )
