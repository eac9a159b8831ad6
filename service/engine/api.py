"""What all others may know of an engine: what it is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from service.engine.grammar import Grammar


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
    grammar: what the answer must match; None for any text. Its end token ends the answer even under ignore_eos.
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
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One token as the engine publishes it. time_s is on the monotonic clock of `time.perf_counter`."""

    id: int
    time_s: float
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One reading of an engine for /metrics and /info. Counters only rise."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int
    num_steps: int
    weight_bytes: int
    kv_cache_bytes: int
    step_batch_sizes: tuple[int, ...] = ()
    """Entry n counts the steps that n requests took part in."""
    num_restarts: int = 0
    """Times the engine went on after a step had raised."""

    @property
    def kv_cache_usage_ratio(self) -> float:
        return 1.0 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0
