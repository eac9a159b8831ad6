"""A runner that computes nothing: it can break, hang, and say which request is to fail alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from service.engine.scheduler import Chunk, Step, StepResults


class ScriptedRunner:
    """The n-th token of every request is n + offset.

    on_execute, on_read: called with the number of the step, from 0; what they raise, the step raises.
    spoil: the result of a chunk instead of a token, or None.
    is_done: whether its steps say that they have ended.   others_late: that another rank launched them late.
    only_launches: as in `StepRunner`.
    """

    kv_cache_bytes = 0

    def __init__(self, is_async: bool = True, offset: int = 0, step_s: float = 0.0) -> None:
        self.is_async = self.only_launches = is_async
        self.offset = offset
        self.step_s = step_s
        self.is_done = self.others_late = False
        self.num_steps = 0
        self.on_execute: Callable[[int], None] = lambda _: None
        self.on_read: Callable[[int], None] = lambda _: None
        self.spoil: Callable[[Chunk], Exception | None] = lambda _: None

    def execute(self, step: Step) -> ScriptedHandle:
        number, self.num_steps = self.num_steps, self.num_steps + 1
        time.sleep(self.step_s)
        self.on_execute(number)
        return ScriptedHandle(self, number, [chunk for chunk in step.chunks if chunk.samples])


class ScriptedHandle:
    shape = None

    def __init__(self, runner: ScriptedRunner, number: int, chunks: list[Chunk]) -> None:
        self.runner, self.number, self.chunks = runner, number, chunks
        self.is_done = runner.is_done

    def read(self) -> StepResults:
        self.runner.on_read(self.number)
        spoilt = ((place, self.runner.spoil(chunk)) for place, chunk in enumerate(self.chunks))
        faults = {place: error for place, error in spoilt if error is not None}
        ids = [chunk.index + self.runner.offset for chunk in self.chunks]
        return StepResults(time.perf_counter(), ids, faults, others_late=self.runner.others_late)


class Hang:
    """Blocks whoever calls it from a step on, until released."""

    def __init__(self, from_step: int) -> None:
        self.from_step = from_step
        self.begun, self.release = threading.Event(), threading.Event()

    def __call__(self, number: int) -> None:
        if number >= self.from_step:
            self.begun.set()
            self.release.wait(120)


def raising(error: Exception, *steps: int) -> Callable[[int], None]:
    """Raise at these steps."""

    def check(number: int) -> None:
        if number in steps:
            raise error

    return check
