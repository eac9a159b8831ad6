"""The messages of an engine: commands in, one piece of news per step out.

The same structs are used within a process and, encoded as MessagePack, between two (`service.host.channel`). A request
is identified by its handle, a number chosen by the submitter.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from service.engine.api import FinishReason, SamplingParams
from service.errors import EngineFailed, OttavaError, leaves


class Submit(msgspec.Struct, array_like=True, frozen=True, tag="submit"):
    """Queue a request. number: its position among the requests sent to this engine, from 1; seed: 0 .. 2^63 - 1."""

    variant: str
    number: int
    handle: int
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival_s: float
    seed: int


class Finish(msgspec.Struct, array_like=True, frozen=True, tag="finish"):
    """End a request early."""

    variant: str
    handle: int
    reason: FinishReason


Command = Submit | Finish


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """An error of `service.errors` in a message: class name, message, and the field that caused it."""

    kind: str
    message: str
    param: str | None = None


def fault_of(error: Exception) -> Fault:
    """Encode an error. Any that is not an OttavaError becomes an EngineFailed that names only its class."""
    if isinstance(error, OttavaError):
        return Fault(type(error).__name__, error.message, error.param)
    return Fault(EngineFailed.__name__, f"the engine raised {type(error).__name__}")


def error_of(fault: Fault) -> OttavaError:
    """Decode an error; an unknown class becomes EngineFailed."""
    return _LEAVES.get(fault.kind, EngineFailed)(fault.message, fault.param)


_LEAVES = {leaf.__name__: leaf for leaf in leaves()}


class Gauges(msgspec.Struct, array_like=True, frozen=True):
    """One reading of an engine; see `EngineStats`. num_taken: number of the last `Submit` that is counted in it."""

    num_taken: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    num_restarts: int = 0
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    num_graph_steps: int = 0
    num_plain_steps: int = 0
    num_padding_tokens: int = 0
    num_late_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class Logprob(msgspec.Struct, array_like=True, frozen=True):
    """The log-probability of a token, and the likeliest tokens at its position with theirs."""

    logprob: float
    top: list[tuple[int, float]] = []


class Scored(msgspec.Struct, array_like=True, frozen=True):
    """The log-probabilities of all prompt tokens but the first; sent no later than the request's first output token."""

    handle: int
    time_s: float
    logprobs: list[Logprob]


class Ended(msgspec.Struct, array_like=True, frozen=True):
    """A request that has ended, sent after its last token; the engine has freed what it held.

    fault: the error that ended it, or None if it finished normally.
    """

    handle: int
    reason: FinishReason
    time_s: float
    fault: Fault | None = None


class News(msgspec.Struct, array_like=True, tag="news"):
    """The results of one step of an engine, and what happened since the last news.

    num_requests: requests in the step; 0 if the news holds no step.
    time_s: when the step's results were read.
    handles, token_ids: the requests that got a token, and the tokens; several of a request, in order, with drafts.
    logprobs: (index into `handles`, log-probabilities), for the requests that want them.
    scheduled: (handle, time of its first step, cached prompt tokens), sent before the request's first token.
    counted: (handle, steps so far, requests in them so far), for requests that took part in steps without a token.
    released: requests that a `Finish` has ended and whose resources are freed.
    """

    variant: str
    gauges: Gauges
    num_requests: int = 0
    time_s: float = 0.0
    handles: list[int] = []
    token_ids: list[int] = []
    logprobs: list[tuple[int, Logprob]] = []
    scheduled: list[tuple[int, float, int]] = []
    counted: list[tuple[int, int, int]] = []
    scored: list[Scored] = []
    ended: list[Ended] = []
    released: list[int] = []


Sink = Callable[[News], None]
"""Receives an engine's news on the engine's thread; must not block."""
