"""The engine's interface to the web: protocols and the frozen values they exchange. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal, Protocol

import msgspec


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The service validates the ranges; the engine does not check them again.

    temperature: 0 is greedy, and then only penalties and biases still have an effect.
    top_k, min_p, top_p: 0, 0 and 1 switch the filter off.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once and for each time; 0
        is off.
    logit_bias: (token id, value to add to its logit), each token once.
    end_ids: tokens that end the answer, beside the model's own, even with ignore_eos.
    min_tokens, held_ids: none of these tokens is sampled before the answer has min_tokens.
    seed: None draws a new one.
    logprobs: None for none, n for the chosen token's log-probability and those of the n likeliest (0..20).
    prompt_logprobs: the same for every prompt token but the first.
    grammar: the rules that the answer must match, as passed to `Engine.compile`; None for any text. The end token ends
        a constrained answer even with ignore_eos.
    priority: of the requests of one owner, those of a lower number start before others, and are preempted after them.
    owner: the API key that it came with. Owners share rows, blocks and steps fairly.
    salt: only prompts of the same salt are found in the prefix cache, so that nobody learns from the time to the first
        token what others have sent.
    max_cached: most prompt tokens to take from the prefix cache; None for any number.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    end_ids: tuple[int, ...] = ()
    held_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    priority: int = 0
    owner: str = ""
    salt: str = ""
    max_cached: int | None = None


class Token(msgspec.Struct, frozen=True, gc=False):
    """One generated token. time_s is read from `time.perf_counter`.

    A struct, because there are many: it is made in a tenth of a dataclass's time, and no garbage collection visits it.
    """

    id: int
    time_s: float
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot of a request's progress. Times are read from `time.perf_counter`.

    first_scheduled_s: when its first step was planned.
    finish_reason, finished_s: set once the engine has ended the request.
    num_generated: tokens published so far.
    num_cached: prompt tokens whose keys and values were in the cache on arrival.
    num_accepted: generated tokens that came beside another one of the same step, since a draft was right.
    batch_size_mean: mean number of requests per step, over the steps that this request took part in.
    prompt_logprobs: if requested, one entry for each prompt token but the first; complete with the first output token.
    is_released: the engine has freed everything that the request held.
    """

    first_scheduled_s: float | None = None
    finish_reason: FinishReason | None = None
    finished_s: float | None = None
    num_generated: int = 0
    num_cached: int = 0
    num_accepted: int = 0
    batch_size_mean: float = 0.0
    prompt_logprobs: tuple[Token, ...] = ()
    is_released: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One reading of an engine for /metrics and /info. Counters never decrease."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    step_batch_sizes: tuple[int, ...] = ()
    """Entry n counts the steps with n requests."""
    num_restarts: int = 0
    """How often the engine continued after a fault, in the same process or in a new one."""
    num_graph_steps: int = 0
    """Steps that one CUDA graph ran; `num_plain_steps` are those whose kernels were launched one by one."""
    num_plain_steps: int = 0
    num_padding_tokens: int = 0
    """Token rows that only filled steps up to the sizes of their graphs."""
    num_late_steps: int = 0
    """Steps whose launch, on any rank, was not done before the step before had ended."""
    num_draft_tokens: int = 0
    """Tokens that were guessed and checked; `num_accepted_tokens` of them were right."""
    num_accepted_tokens: int = 0

    @property
    def kv_cache_usage_ratio(self) -> float:
        return 1.0 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0


class Stream(Protocol):
    """A submitted request, as used from the event loop.

    Iterating yields lists of new tokens, those of all steps since the last read, and stops when the request has
    finished. It raises `EngineFailed` if the engine or this request fails. `finish` ends the request early and frees
    what it held: STOP if the caller found a stop string, ABORT if the client has disconnected. Unread tokens are then
    dropped. `finish` is idempotent; call it on the event loop's thread.
    """

    @property
    def progress(self) -> Progress: ...

    @property
    def finish_reason(self) -> FinishReason | None:
        """That of the progress, which takes longer to make: asked for after every token."""
        ...

    @property
    def seed(self) -> int:
        """The seed of its random numbers: the requested one, or the one drawn for it."""
        ...

    def __aiter__(self) -> AsyncIterator[list[Token]]: ...

    def finish(self, reason: FinishReason) -> None: ...

    async def released(self) -> None:
        """Return once the engine has freed what the request held, which is one step after `finish`."""
        ...


class Engine(Protocol):
    """One variant of the model, as used from the event loop; it runs in this process or behind a channel.

    dtype: float type of the activations, e.g. "bfloat16". dtype and max_model_len are set once the host is open.
    """

    variant: str
    max_model_len: int
    dtype: str

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, arrival_s: float | None = None
    ) -> Stream:
        """Queue a request. Call it from a running event loop.

        Raises:
            QueueFull: the queue is at its limit.
            EngineFailed: the engine has failed for good.
        """
        ...

    async def compile(self, rules: str, num_answers: int = 1) -> None:
        """Compile a grammar ahead of the requests that will use it. Cancelling ends it.

        Args:
            rules: see `service.engine.grammar.Grammars.compile`.
            num_answers: how many answers of one request are to follow it.

        Raises:
            InvalidRequest: the rules cannot be compiled for this vocabulary, or are dearer than the limits allow.
        """
        ...

    async def num_cached(self, prompt_ids: list[int], salt: str) -> int:
        """How many tokens of a prompt are in the prefix cache now.

        Raises:
            EngineFailed: the engine is gone.
        """
        ...

    def stats(self) -> EngineStats: ...

    @property
    def failure(self) -> str | None:
        """The fault that stopped the engine for good, or None while it runs."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of an engine's start-up: done of total, with total 0 if unknown."""

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

    scheme, description, alpha, calibration: how it was quantized; null if the checkpoint does not say.
    checkpoint: name of its folder; null for random weights.
    generation: 1 at start, increased by every reload.   loaded_at: when these weights were loaded, in ISO 8601.
    sink: tokens that are put in front of every prompt that does not begin with them, and are kept in float.
    self_check_kl: mean KL divergence from the baseline on the prompts of the self-check, in nats; null for the baseline
        itself, without a baseline, and before the check.
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
    self_check_kl: float | None = None
    sink: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class OneToken:
    """The bytes that a step of one token must read, and the speedup that they allow at best.

    weight_bytes: by variant.
    speedup_at_best: by variant, the baseline's bytes over its own; null unless this device's roofs are known and both
        steps are bound by memory on it.
    text: both in a sentence.
    """

    weight_bytes: Mapping[str, int]
    speedup_at_best: Mapping[str, float | None]
    text: str


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One process of the engines, with its part of the model and its device.

    weight_bytes, kv_cache_bytes: of its part, by variant.
    free_bytes: memory of the device when it was measured last: at start, after a self-check, after a reload; null on a
        CPU.
    state: running, or ended until the engines are started again.
    """

    rank: int
    pid: int
    device: str
    weight_bytes: Mapping[str, int]
    kv_cache_bytes: Mapping[str, int]
    free_bytes: int | None
    state: Literal["running", "ended"] = "running"


RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The sampling parameters that a model's generation_config.json may recommend."""


@dataclass(frozen=True, slots=True)
class HostInfo:
    """The answer to GET /info.

    sampling_defaults: values of RECOMMENDED that a request has unless it names its own.
    tensor_parallel: ranks that share the model, on as many devices; sizes of a variant are those of the first rank.
    ranks: each of them.
    vocab_size: rows of the model's embedding: token ids run from 0 to vocab_size - 1, whatever the tokenizer knows.
    """

    model: str
    family: str
    max_model_len: int
    vocab_size: int
    variants: Mapping[str, VariantInfo]
    one_token: OneToken
    sampling_defaults: Mapping[str, float]
    device: str
    gpu_memory_bytes: int | None
    versions: Mapping[str, str]
    tensor_parallel: int
    ranks: Sequence[RankInfo]


@dataclass(frozen=True, slots=True)
class Reloaded:
    """A reload that succeeded.

    generation: of the weights, 1 at start.
    load_s: time to read, check and warm up the new weights while the old ones still served.
    pause_s: time during which no request could start.
    """

    variant: str
    checkpoint: str
    generation: int
    loaded_at: datetime
    load_s: float
    pause_s: float
