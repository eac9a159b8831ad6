"""An engine that computes nothing and takes a set time per step, and a vocabulary where no model is at hand."""

from __future__ import annotations

import itertools
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from service.engine.device.device_thread import DeviceThread
from service.engine.loop import EngineLoop
from service.engine.scheduler import Scheduler, Step, StepResults
from service.engine.shapes import Shape
from service.settings import Settings
from service.text.tokenizer import Tokenizer

LETTERS = string.ascii_lowercase
APART = 97
"""Places between the answers of two rows: no two streams say the same at once."""


@dataclass(frozen=True, slots=True)
class PacedStep:
    """A launched step: its tokens, when it is done, how long it takes, and its shape: that of itself, unpadded."""

    ids: list[int]
    done_s: float
    step_s: float
    shape: Shape

    @property
    def is_done(self) -> bool:
        return time.perf_counter() >= self.done_s

    def read(self) -> StepResults:
        """Sleep until the step is done. Sleeping lets other threads run, as waiting for a GPU does."""
        left_s = self.done_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        return StepResults(time.perf_counter(), self.ids, shape=self.shape, device_s=self.step_s)


class PacedRunner:
    """Answers with a text token by token, and is as far as its clock says: a device that computes, but for the result.

    A step begins when it is launched or the one before it is done, whichever is later, and takes step_s. So a sleep
    that is too long, or a host that is late by less than a step, delays nothing after it; a host that is later does.

    Args:
        ids: of the text.
        step_s: seconds of a step, whatever is in it.
        launch_s: CPU seconds for which launching a step keeps every other thread from running Python.
        acquires: parts of the launch. Before each it lets the lock go, as torch does in calls of its own, and has to
            get it back from whoever took it meanwhile.
    """

    is_async = only_launches = True
    kv_cache_bytes = 0

    def __init__(self, ids: Sequence[int], step_s: float, launch_s: float = 0.0, acquires: int = 1) -> None:
        self._ids = ids
        self._step_s = step_s
        self._part_s = launch_s / acquires
        self._acquires = acquires
        self._free_s = 0.0

    def execute(self, step: Step) -> PacedStep:
        if self._part_s:
            for _ in range(self._acquires):
                time.sleep(0)
                done_s = time.thread_time() + self._part_s
                while time.thread_time() < done_s:
                    pass
        self._free_s = max(self._free_s, time.perf_counter()) + self._step_s
        ids = self._ids
        return PacedStep(
            [ids[(chunk.request.row * APART + chunk.index) % len(ids)] for chunk in step.chunks if chunk.samples],
            self._free_s,
            self._step_s,
            Shape(step.num_tokens, step.num_requests, step.is_decode),
        )


def paced_engine(variant: str, runner: PacedRunner, max_model_len: int, settings: Settings) -> EngineLoop:
    """A started engine, with room for every request it may run."""
    rows, block_size = settings.max_num_requests, settings.block_size
    num_blocks = rows * -(-max_model_len // block_size)
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_requests=rows,
        max_batched_tokens=settings.step_tokens("cpu"),
        has_prefix_cache=settings.prefix_cache,
    )
    return EngineLoop(
        variant,
        scheduler,
        runner,
        device_thread=DeviceThread(),
        max_model_len=max_model_len,
        max_waiting=settings.max_waiting,
    ).start()


def made_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of `made_backend`, without end tokens."""
    return Tokenizer(made_backend(vocab_size), frozenset())


def made_backend(vocab_size: int) -> Backend:
    """A byte-level tokenizer of so many tokens: the 256 bytes, then words of letters behind a space, not merged to.

    Decoding it costs what decoding a trained one of that size does; encoding gives a token for each byte.

    Raises:
        ValueError: it would not hold every byte.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level vocabulary has at least {len(alphabet)} tokens")
    letters = itertools.chain.from_iterable(itertools.product(LETTERS, repeat=n) for n in itertools.count(2))
    words = ("\u0120" + "".join(word) for word in letters)
    tokens = [*alphabet, *itertools.islice(words, vocab_size - len(alphabet))]
    backend = Backend(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
