"""The record of one HTTP request, filled while it is served and read by the access log and the traces."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from service.engine.api import SamplingParams
from service.measures import RunMetrics

ANONYMOUS = "anonymous"
"""Key name of clients if no keys are set, or on a route that needs none."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run that has ended. outcome: its label in `requests_total`. prompt, output: only with log_prompts."""

    id: str
    variant: str
    outcome: str
    params: SamplingParams
    started_s: float
    ended_s: float
    metrics: RunMetrics
    prompt: str | None = None
    output: str | None = None


@dataclass(slots=True)
class RequestRecord:
    """A request, from its arrival until its answer has been sent.

    received_s, ended_s: from `time.perf_counter`; epoch_ns is `time.time_ns` at received_s.
    status: None until an answer has started; stays None if the client disconnects before.
    server: address and port that it was sent to.
    route: the template of its path, which has few values, unlike the path itself.
    num_answers: the answers that the limits of its key count.
    trace: its headers `traceparent` and `tracestate`, if present.
    trace_id, is_sampled: its trace, and whether that will be exported; set on arrival by the tracer, if there is one.
    """

    id: str
    method: str
    path: str
    scheme: str
    server: tuple[str, int | None]
    trace: dict[str, str]
    received_s: float = field(default_factory=time.perf_counter)
    epoch_ns: int = field(default_factory=time.time_ns)
    ended_s: float = 0.0
    status: int | None = None
    route: str = "unknown"
    key: str = ANONYMOUS
    num_answers: int = 1
    runs: list[RunRecord] = field(default_factory=list)
    trace_id: int | None = None
    is_sampled: bool = False


current: ContextVar[RequestRecord | None] = ContextVar("current_request", default=None)
"""The request that the current task serves, or None."""
