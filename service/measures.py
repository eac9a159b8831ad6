"""Times and ratios of a run: their models, and pure functions of times on the monotonic clock."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import floor
from statistics import fmean

from pydantic import BaseModel, Field

from service.engine.api import Progress, Token


class Spread(BaseModel):
    """Mean and percentiles (linear between ranks)."""

    mean: float
    p50: float
    p99: float


class RunMetrics(BaseModel):
    """Times of one run on a monotonic clock; null if there is nothing to measure."""

    queue_ms: float | None = Field(description="From the request's arrival to its first step.")
    prefill_ms: float | None = Field(description="From its first step to its first token.")
    ttft_ms: float | None = Field(description="First token sent minus request received.")
    itl_ms: Spread | None = Field(description="Between successive tokens sent.")
    tpot_ms: float | None = Field(description="(e2e - ttft) / (generated - 1).")
    e2e_ms: float | None = Field(description="Last token sent minus request received.")
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = Field(description="Prompt tokens found in the cache.")
    accepted_tokens: int = Field(description="Generated tokens that a right draft brought, with speculation.")
    tokens_per_s: float | None = Field(description="generated / e2e.")
    batch_size_mean: float = Field(description="Mean number of requests per step, over this request's steps.")


class Speedup(BaseModel):
    """This variant's speedup over the baseline; above 1 is better in every field."""

    ttft: float | None
    tpot: float | None
    e2e: float | None
    tokens_per_s: float | None


class Agreement(BaseModel):
    """How well two answers agree."""

    common_prefix_tokens: int = Field(description="Tokens before the first difference.")
    match_ratio: float = Field(description="Positions with the same token / tokens of the longer answer.")
    logprob_delta_mean: float | None = Field(
        description="Mean over the common prefix of |log-probability here - on the baseline|; null without a prefix."
    )


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between ranks.

    Raises:
        ValueError: values is empty.
    """
    if not values:
        raise ValueError("the percentile of nothing is not defined")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    below = floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def measure(
    progress: Progress, tokens: Sequence[Token], *, num_prompt: int, received_s: float, sent_s: Sequence[float]
) -> RunMetrics:
    """The metrics of one run.

    ttft = sent_0 - received        e2e = sent_{n-1} - received        tpot = (e2e - ttft) / (n - 1)

    Args:
        progress: the engine's snapshot of the request.
        tokens: the n tokens that were sent; may be fewer than the engine generated.
        num_prompt: tokens of the prompt.
        received_s: when the request arrived.
        sent_s: [n], when each token was sent.
    """
    scheduled_s = progress.first_scheduled_s
    ttft_s = sent_s[0] - received_s if sent_s else None
    e2e_s = sent_s[-1] - received_s if sent_s else None
    gaps_ms = [(after - before) * 1e3 for before, after in pairwise(sent_s)]
    return RunMetrics(
        queue_ms=None if scheduled_s is None else (scheduled_s - received_s) * 1e3,
        prefill_ms=(tokens[0].time_s - scheduled_s) * 1e3 if tokens and scheduled_s is not None else None,
        ttft_ms=None if ttft_s is None else ttft_s * 1e3,
        itl_ms=Spread(mean=fmean(gaps_ms), p50=percentile(gaps_ms, 50), p99=percentile(gaps_ms, 99))
        if gaps_ms
        else None,
        tpot_ms=None if ttft_s is None or e2e_s is None or not gaps_ms else (e2e_s - ttft_s) / len(gaps_ms) * 1e3,
        e2e_ms=None if e2e_s is None else e2e_s * 1e3,
        prompt_tokens=num_prompt,
        generated_tokens=len(tokens),
        cached_tokens=progress.num_cached,
        accepted_tokens=progress.num_accepted,
        tokens_per_s=len(tokens) / e2e_s if e2e_s else None,
        batch_size_mean=progress.batch_size_mean,
    )
