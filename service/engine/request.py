"""What a client asked for and how far the engine has come with it: a few integers and their order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from service.engine.api import EngineStats, FinishReason, SamplingParams, Token
from service.engine.grammar import Matcher


@dataclass(slots=True, eq=False)
class Request:
    """One generation, from its arrival to its last token.

    Always: num_computed <= num_tokens. Keys and values of the first num_computed tokens are in the cache (or are
    being written by the step in flight); num_tokens counts the prompt, the tokens the host has read, and the
    num_pending tokens that steps in flight will yield and the host has not yet read (at most 2).
    row: the request's place in the runner's per-request state while it runs, else -1.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival_s: float
    seed: int
    output: list[Token] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    blocks: list[int] = field(default_factory=list)
    row: int = -1
    finish_reason: FinishReason | None = None
    first_scheduled_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    num_steps: int = 0
    num_batch_rows: int = 0
    num_cached: int = 0
    """Prompt tokens whose keys and values were already in the cache on arrival."""
    prompt_logprobs: list[Token] = field(default_factory=list)
    """Where asked for: entry i belongs to prompt token i + 1; complete when the first output token is published."""
    num_scored: int = 0
    """Entries of prompt_logprobs, those included that steps in flight will bring."""
    matcher: Matcher | None = field(init=False)
    """How far the output has come in its grammar; None where it has none."""

    def __post_init__(self) -> None:
        self.matcher = None if self.params.grammar is None else self.params.grammar.matcher()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output) + self.num_pending

    @property
    def num_generated(self) -> int:
        return len(self.output) + self.num_pending

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_behind(self) -> bool:
        """Its grammar cannot say what may come next before the host has read the last token."""
        return self.matcher is not None and self.num_pending > 0

    @property
    def batch_size_mean(self) -> float:
        """Mean number of requests in the steps this one took part in."""
        return self.num_batch_rows / self.num_steps if self.num_steps else 0.0

    def token_id(self, index: int) -> int:
        """The token at a position the host knows."""
        num_prompt = len(self.prompt_ids)
        return self.prompt_ids[index] if index < num_prompt else self.output[index - num_prompt].id


class Stream(Protocol):
    """A submitted request seen from the event loop.

    Iterating yields the new tokens, of a step or of as many as have passed meanwhile, and ends when the request has
    finished; if the engine fails, or this request alone, it raises `EngineFailed`. `finish` ends the request early
    (idempotent, from the event loop's thread) and frees what it held: with STOP when the caller saw a stop string, with
    ABORT when the client is gone. Tokens that have not been read by then are dropped.
    """

    request: Request

    def __aiter__(self) -> AsyncIterator[list[Token]]: ...

    def finish(self, reason: FinishReason) -> None: ...


class Engine(Protocol):
    """What the HTTP side needs of an engine: `EngineLoop` in production, the same loop over a fake runner in tests."""

    variant: str
    max_model_len: int
    dtype: str
    """Float type of the activations, e.g. "bfloat16"."""

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, arrival_s: float | None = None
    ) -> Stream:
        """Queue a request; called from a running event loop. Raises `QueueFull` or `EngineFailed`."""
        ...

    def stats(self) -> EngineStats: ...

    @property
    def failure(self) -> BaseException | None:
        """What stopped the engine's thread, or None while it runs."""
        ...
