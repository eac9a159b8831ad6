"""What passes between an engine's thread and whoever submits to it: commands in, one piece of news a step out.

The same structs pass within a process and, encoded as MessagePack, between two (`service.host.channel`). Requests go by
a handle, a number that whoever submits has chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from service.engine.api import FinishReason, SamplingParams
from service.errors import EngineFailed, OttavaError, leaves


class Submit(msgspec.Struct, array_like=True, frozen=True, tag="submit"):
    """Queue a request. number: it is the n-th that this engine is sent, counted from 1; seed: in 0 .. 2^63 - 1."""

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
    """An error of `service.errors` on its way: its class by name, its message, and the field at fault."""

    kind: str
    message: str
    param: str | None = None


def fault_of(error: Exception) -> Fault:
    """An error as it is sent. What is none of ours becomes an EngineFailed that names its class alone."""
    if isinstance(error, OttavaError):
        return Fault(type(error).__name__, error.message, error.param)
    return Fault(EngineFailed.__name__, f"the engine raised {type(error).__name__}")


def error_of(fault: Fault) -> OttavaError:
    """The error that was sent."""
    return _LEAVES.get(fault.kind, EngineFailed)(fault.message, fault.param)


_LEAVES = {leaf.__name__: leaf for leaf in leaves()}


class Gauges(msgspec.Struct, array_like=True, frozen=True):
    """One reading of an engine; see `EngineStats`. num_taken: the number of the last `Submit` that it counts."""

    num_taken: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    num_restarts: int = 0
    weight_bytes: int = 0
    kv_cache_bytes: int = 0


class Logprob(msgspec.Struct, array_like=True, frozen=True):
    """The log-probability of a token, and the likeliest tokens at its place with theirs."""

    logprob: float
    top: list[tuple[int, float]] = []


class Scored(msgspec.Struct, array_like=True, frozen=True):
    """The log-probabilities of a prompt's own tokens, all but the first, before the request's first token."""

    handle: int
    time_s: float
    logprobs: list[Logprob]


class Ended(msgspec.Struct, array_like=True, frozen=True):
    """A request that is over, behind its last token; the engine holds nothing of it any more.

    fault: what ended it instead of a reason of its own.
    """

    handle: int
    reason: FinishReason
    time_s: float
    fault: Fault | None = None


class News(msgspec.Struct, array_like=True, tag="news"):
    """All that a step of one engine brought, or what happened between two steps.

    num_requests: that took part in the step whose results these are; 0 where there is none.
    time_s: when its results were read.
    handles, token_ids: the requests that got a token, and the tokens.
    logprobs: (place in `handles`, its log-probabilities), of those that asked for them.
    scheduled: (handle, time of its first step, cached prompt tokens), before any of its tokens.
    counted: (handle, steps so far, requests in them so far), of requests whose steps were not all told by `handles`.
    released: requests that were ended by `Finish` and hold nothing any more.
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
"""Takes an engine's news, on the engine's thread; must not wait."""
