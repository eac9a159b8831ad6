"""What a run's times and two runs' answers amount to: pure functions of `perf_counter` times and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import floor
from statistics import fmean

from service.engine.api import Token
from service.engine.request import Request
from service.schemas import Agreement, RunMetrics, Speedup, Spread


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


def measure(request: Request, tokens: Sequence[Token], received_s: float, sent_s: Sequence[float]) -> RunMetrics:
    """The metrics of one run.

    ttft = sent_0 - received        e2e = sent_{n-1} - received        tpot = (e2e - ttft) / (n - 1)

    Args:
        request: the engine's side: when it was first scheduled, how full its steps were.
        tokens: the n tokens that were sent; may be fewer than the engine generated.
        received_s: when the request came in.
        sent_s: [n], when each token went out.
    """
    scheduled_s = request.first_scheduled_s
    ttft_s = sent_s[0] - received_s if sent_s else None
    e2e_s = sent_s[-1] - received_s if sent_s else None
    gaps_ms = [(after - before) * 1e3 for before, after in pairwise(sent_s)]
    return RunMetrics(
        queue_ms=None if scheduled_s is None else (scheduled_s - request.arrival_s) * 1e3,
        prefill_ms=(tokens[0].time_s - scheduled_s) * 1e3 if tokens and scheduled_s is not None else None,
        ttft_ms=None if ttft_s is None else ttft_s * 1e3,
        itl_ms=Spread(mean=fmean(gaps_ms), p50=percentile(gaps_ms, 50), p99=percentile(gaps_ms, 99))
        if gaps_ms
        else None,
        tpot_ms=None if ttft_s is None or e2e_s is None or not gaps_ms else (e2e_s - ttft_s) / len(gaps_ms) * 1e3,
        e2e_ms=None if e2e_s is None else e2e_s * 1e3,
        prompt_tokens=len(request.prompt_ids),
        generated_tokens=len(tokens),
        cached_tokens=request.num_cached,
        tokens_per_s=len(tokens) / e2e_s if e2e_s else None,
        batch_size_mean=request.batch_size_mean,
    )


def speedup(this: RunMetrics, baseline: RunMetrics) -> Speedup:
    """How many times better this run did; None where either side is missing or zero.

    baseline / this for times        this / baseline for tokens_per_s
    """
    return Speedup(
        ttft=_ratio(baseline.ttft_ms, this.ttft_ms),
        tpot=_ratio(baseline.tpot_ms, this.tpot_ms),
        e2e=_ratio(baseline.e2e_ms, this.e2e_ms),
        tokens_per_s=_ratio(this.tokens_per_s, baseline.tokens_per_s),
    )


def agreement(this: Sequence[Token], baseline: Sequence[Token]) -> Agreement:
    """How far two answers go together, token by token. Two empty answers agree.

    match_ratio = |{i : this_i = baseline_i}| / max(len)        delta = mean_{i < prefix} |logprob_i - baseline_i|

    After the first difference the two models read different texts, so log-probabilities are compared before it alone.
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
