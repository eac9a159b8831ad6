"""What is known of one HTTP request while it is served: filled on its way, read by the access log and the traces."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from service.engine.api import SamplingParams
from service.measures import RunMetrics

ANONYMOUS = "anonymous"
"""Name of every client where no keys are set, or where a route needs none."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run that ended. outcome: as `requests_total` counts it. prompt, output: only with log_prompts."""

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
    """A request, from its arrival until its answer has gone out.

    received_s, ended_s: on the clock of `time.perf_counter`; epoch_ns is what `time.time_ns` said at received_s.
    status: None until an answer has started, and for good where the client left before.
    server: address and port that it came to.
    route: the template of its path, which unlike the path itself takes few values.
    trace: its headers `traceparent` and `tracestate`, where it has them.
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
    runs: list[RunRecord] = field(default_factory=list)


current: ContextVar[RequestRecord | None] = ContextVar("current_request", default=None)
"""The request that this task serves; None outside of any."""
