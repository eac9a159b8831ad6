"""All that the web sees of an engine: what it is asked, what it answers, the protocols between. No torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The service validates the ranges; the engine trusts them.

    temperature 0 is greedy: the other filters then change nothing but the repetition penalty.
    top_k 0 and min_p 0 and top_p 1 switch their filter off. seed None draws a fresh one.
    logprobs: None for none, n for the chosen token's log-probability and the n likeliest (0..20).
    prompt_logprobs: the same of every prompt token but the first.
    grammar: the rules that the answer must match, as `Engine.compile` takes them; None for any text. The end token
        ends a constrained answer even under ignore_eos.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One token as the engine publishes it. time_s is on the monotonic clock of `time.perf_counter`."""

    id: int
    time_s: float
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an engine has come with a request, at one moment. Times are those of `time.perf_counter`.

    first_scheduled_s: when its first step was planned.
    finish_reason, finished_s: set once the engine has ended it.
    num_generated: tokens that were published.
    num_cached: prompt tokens whose keys and values were in the cache on arrival.
    batch_size_mean: mean number of requests in the steps that this one took part in.
    prompt_logprobs: where asked for, one entry for each prompt token but the first; there with the first token.
    is_released: the engine holds nothing of it any more.
    """

    first_scheduled_s: float | None = None
    finish_reason: FinishReason | None = None
    finished_s: float | None = None
    num_generated: int = 0
    num_cached: int = 0
    batch_size_mean: float = 0.0
    prompt_logprobs: tuple[Token, ...] = ()
    is_released: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One reading of an engine for /metrics and /info. Counters only rise."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    step_batch_sizes: tuple[int, ...] = ()
    """Entry n counts the steps that n requests took part in."""
    num_restarts: int = 0
    """Times the engine went on after a fault: within its process, or in a new one."""

    @property
    def kv_cache_usage_ratio(self) -> float:
        return 1.0 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0


class Stream(Protocol):
    """A submitted request seen from the event loop.

    Iterating yields the new tokens, of a step or of as many as have passed meanwhile, and ends when the request has
    finished; if the engine fails, or this request alone, it raises `EngineFailed`. `finish` ends the request early
    (idempotent, from the event loop's thread) and frees what it held: with STOP when the caller saw a stop string, with
    ABORT when the client is gone. Tokens that have not been read by then are dropped.
    """

    @property
    def progress(self) -> Progress: ...

    @property
    def seed(self) -> int:
        """What its tokens are drawn with: the one asked for, or the one that was drawn for it."""
        ...

    def __aiter__(self) -> AsyncIterator[list[Token]]: ...

    def finish(self, reason: FinishReason) -> None: ...

    async def released(self) -> None:
        """Return once the engine holds nothing of the request, which after a `finish` is a step later."""
        ...


class Engine(Protocol):
    """One variant of the model, seen from the event loop: in this process or behind a channel.

    dtype: float type of the activations, e.g. "bfloat16". It and max_model_len are known once the host is open.
    """

    variant: str
    max_model_len: int
    dtype: str

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, arrival_s: float | None = None
    ) -> Stream:
        """Queue a request; called from a running event loop. Raises `QueueFull` or `EngineFailed`."""
        ...

    async def compile(self, rules: str) -> None:
        """Make a grammar ready for requests that will name it.

        Raises:
            InvalidRequest: the rules cannot be compiled for this vocabulary.
            QueueFull: as many grammars are being compiled as may be.
        """
        ...

    def stats(self) -> EngineStats: ...

    @property
    def failure(self) -> str | None:
        """What stopped the engine for good, or None while it runs."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """What the start-up of an engine is at: done of total, total 0 where the length is not known."""

    name: str
    done: int = 0
    total: int = 0
    detail: str = ""

    def __str__(self) -> str:
        counted = f": {self.done} of {self.total}" if self.total and self.done else ""
        return f"{self.name}{counted}{', ' + self.detail if self.detail else ''}"


@dataclass(frozen=True, slots=True)
class VariantInfo:
    """One precision of the model as it is served.

    scheme, description, alpha, calibration: how it was quantized; null where the checkpoint does not say.
    checkpoint: name of its folder; null for random weights.
    generation: how many weights it has had, 1 at start.   loaded_at: in ISO 8601, of these weights.
    """

    scheme: str | None
    description: str | None
    alpha: float | str | None
    calibration: str | None
    dtype: str
    kv_cache_dtype: str
    weight_bytes: int
    kv_cache_bytes: int
    max_num_requests: int
    checkpoint: str | None
    generation: int
    loaded_at: str


@dataclass(frozen=True, slots=True)
class OneToken:
    """What a step of one token must read, and what that allows at best.

    weight_bytes: by variant.
    speedup_at_best: by variant, the baseline's bytes over its own; null unless this device's roofs are known and both
        steps are bound by memory there.
    text: both in a sentence.
    """

    weight_bytes: Mapping[str, int]
    speedup_at_best: Mapping[str, float | None]
    text: str


@dataclass(frozen=True, slots=True)
class HostInfo:
    """What is served: GET /info."""

    model: str
    family: str
    max_model_len: int
    variants: Mapping[str, VariantInfo]
    one_token: OneToken
    device: str
    gpu_memory_bytes: int | None
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reloaded:
    """A reload that succeeded.

    generation: of the weights, 1 at start.
    load_s: of reading, checking and warming up beside the old weights.
    pause_s: for which no request could start.
    """

    variant: str
    checkpoint: str
    generation: int
    loaded_at: datetime
    load_s: float
    pause_s: float
