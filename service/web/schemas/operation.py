"""Response bodies of the operators' routes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from service.comparison.tally import ComparisonSummary
from service.telemetry.recent import RecentRequest


class RecentResponse(BaseModel):
    """Answer of GET /requests/recent."""

    requests: list[RecentRequest] = Field(description="At most a hundred, oldest first.")


class ShadowState(BaseModel):
    """The state of shadow mode."""

    rate: float = Field(description="Share of live requests that is sampled.")
    waiting: int = Field(description="Requests queued for replay, including the one being replayed.")


class CompareResponse(BaseModel):
    """Answer of GET /compare."""

    compare: ComparisonSummary = Field(description="Requests sent with `compare`.")
    shadow: ComparisonSummary = Field(description="Live requests replayed in shadow mode.")
    shadow_state: ShadowState


class Health(BaseModel):
    """Answer of GET /health."""

    status: Literal["ok", "failed"]
    variants: dict[str, str] = Field({}, description="The variants whose engine has failed for good, and why.")


class Readiness(BaseModel):
    """Answer of GET /ready."""

    ready: bool
    variants: dict[str, str] = Field(description="`ready` for each; if any is not, only those, each with the reason.")
