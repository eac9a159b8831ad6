"""Times and lengths of the last finished requests, without their text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, Field

from service.engine.api import FinishReason
from service.measures import RunMetrics

MAX_RECENT = 100


class RecentRequest(BaseModel):
    """One of the last finished runs, without its text."""

    id: str
    variant: str
    route: str
    finish_reason: FinishReason
    ttft_ms: float | None = Field(description="First token sent minus request received.")
    tpot_ms: float | None = Field(description="(e2e - ttft) / (generated - 1).")
    e2e_ms: float | None = Field(description="Last token sent minus request received.")
    prompt_tokens: int
    generated_tokens: int
    age_s: float = Field(description="Seconds since it finished.")


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that finished normally. finished_s: from `time.perf_counter`."""

    id: str
    variant: str
    route: str
    finish_reason: FinishReason
    metrics: RunMetrics
    finished_s: float


class Recent:
    """The last hundred finished runs, without those that were cut off or failed."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._finished: deque[Finished] = deque(maxlen=MAX_RECENT)

    def add(self, run_id: str, variant: str, route: str, reason: FinishReason, metrics: RunMetrics) -> None:
        """Record a run as finished now."""
        self._finished.append(Finished(run_id, variant, route, reason, metrics, self._clock()))

    def rows(self) -> list[RecentRequest]:
        """The recorded runs, oldest first."""
        now_s = self._clock()
        return [_row(finished, now_s) for finished in self._finished]


def _row(finished: Finished, now_s: float) -> RecentRequest:
    metrics = finished.metrics
    return RecentRequest(
        id=finished.id,
        variant=finished.variant,
        route=finished.route,
        finish_reason=finished.finish_reason,
        ttft_ms=metrics.ttft_ms,
        tpot_ms=metrics.tpot_ms,
        e2e_ms=metrics.e2e_ms,
        prompt_tokens=metrics.prompt_tokens,
        generated_tokens=metrics.generated_tokens,
        age_s=now_s - finished.finished_s,
    )
