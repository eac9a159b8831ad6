"""Speedup and agreement of two runs, as pure functions of their times and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from service.engine.api import Token
from service.measures import Agreement, RunMetrics, Speedup


def speedup(this: RunMetrics, baseline: RunMetrics) -> Speedup:
    """How many times faster this run was; a field is None if either side is missing or zero.

    baseline / this for times        this / baseline for tokens_per_s
    """
    return Speedup(
        ttft=_ratio(baseline.ttft_ms, this.ttft_ms),
        tpot=_ratio(baseline.tpot_ms, this.tpot_ms),
        e2e=_ratio(baseline.e2e_ms, this.e2e_ms),
        tokens_per_s=_ratio(this.tokens_per_s, baseline.tokens_per_s),
    )


def agreement(this: Sequence[Token], baseline: Sequence[Token]) -> Agreement:
    """How well two answers agree, token by token. Two empty answers agree.

    match_ratio = |{i : this_i = baseline_i}| / max(len)        delta = mean_{i < prefix} |logprob_i - baseline_i|

    After the first difference the two models read different texts, so log-probabilities are compared only before it.
    """
    same = [a.id == b.id for a, b in zip(this, baseline, strict=False)]
    prefix = next((place for place, is_same in enumerate(same) if not is_same), len(same))
    longest = max(len(this), len(baseline))
    deltas = [
        abs(a.logprob - b.logprob)
        for a, b in zip(this[:prefix], baseline[:prefix], strict=True)
        if a.logprob is not None and b.logprob is not None
    ]
    return Agreement(
        common_prefix_tokens=prefix,
        match_ratio=sum(same) / longest if longest else 1.0,
        logprob_delta_mean=fmean(deltas) if deltas else None,
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None
