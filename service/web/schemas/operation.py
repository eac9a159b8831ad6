"""Answers of the routes that operators ask."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from service.comparison.tally import ComparisonSummary
from service.telemetry.recent import RecentRequest


class RecentResponse(BaseModel):
    """Answer of GET /requests/recent."""

    requests: list[RecentRequest] = Field(description="At most a hundred, oldest first.")


class ShadowState(BaseModel):
    """How far shadow mode has come."""

    rate: float = Field(description="Share of live requests that is drawn.")
    waiting: int = Field(description="Requests that wait for an idle moment, the one that is replayed included.")


class CompareResponse(BaseModel):
    """Answer of GET /compare."""

    compare: ComparisonSummary = Field(description="Requests sent with `compare`.")
    shadow: ComparisonSummary = Field(description="Live requests replayed in shadow mode.")
    shadow_state: ShadowState


class Health(BaseModel):
    """Answer of GET /health."""

    status: Literal["ok", "failed"]
    variants: dict[str, str] = Field({}, description="Those whose engine has stopped, and why.")


class Readiness(BaseModel):
    """Answer of GET /ready."""

    ready: bool
    variants: dict[str, str] = Field(description="`ready` for each, or while one is not, why for each that is not.")
