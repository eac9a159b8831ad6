"""From records to figures: pure functions of times."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from service.errors import InvalidSettings
from service.measures import percentile
from service.tools.bench.record import Counted, Record

SLO_NAMES = ("ttft", "tpot", "itl", "e2el")
GOOD_SHARE = 0.9
"""A point of which fewer requests meet the SLOs is saturated."""
MAX_ERROR_SHARE = 0.01
MAX_BACKLOG_SHARE, MIN_BACKLOG = 0.1, 3.0
"""A point is saturated if the mean number of requests in flight grows from the second to the last quarter of its
arrivals by more than this share of what arrives in as much time, and by as many requests at least."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, population standard deviation, and percentiles linear between ranks, as numpy's default."""

    mean: float
    std: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None of nothing."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p90, p99 = (percentile(ordered, q) for q in (50, 90, 99))
        return cls(fmean(ordered), pstdev(ordered), p50, p90, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class Phase:
    """One load sent once.

    lag_ms: how late the event loop of the generator woke, sampled. cpu_s: that its process took.
    """

    records: Sequence[Record]
    started_s: float
    ended_s: float
    lag_ms: Sequence[float] = ()
    cpu_s: float = 0.0
    is_open_loop: bool = True

    @property
    def duration_s(self) -> float:
        return self.ended_s - self.started_s


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one or several phases of the same load. Times are of answered requests alone, in milliseconds.

    ttft to e2el: from the actual send. scheduled_ttft, scheduled_e2el: from when the request was to be sent.
    good: requests that met every SLO by the clock of the schedule; None without SLOs.
    lateness: actual send - schedule; None in a closed loop, which has no schedule.
    """

    duration_s: float
    sent: int
    completed: int
    errors: Mapping[str, int]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    good: int | None
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2el: Distribution | None
    scheduled_ttft: Distribution | None
    scheduled_e2el: Distribution | None
    lateness: Distribution | None
    lag: Distribution | None
    cpu_share: float
    max_concurrent: int
    max_output_tokens_per_s: float
    tokens_per_event: float | None
    counted: Sequence[Counted]
    details: Mapping[str, str] = field(default_factory=dict)

    def per_s(self, count: float) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0


def summarize(phases: Sequence[Phase], slos: Mapping[str, float] | None = None) -> Summary:
    """slos: limits in milliseconds by SLO_NAMES."""
    records = [record for phase in phases for record in phase.records]
    answered = [record for record in records if record.is_answered]
    late = [_ms(r.sent_s - r.scheduled_s) for phase in phases if phase.is_open_loop for r in phase.records]
    duration_s = sum(phase.duration_s for phase in phases)
    num_events = sum(len(r.token_s) for r in answered)
    num_tokens = sum(r.output_tokens for r in answered)
    failed = [(r.error, r.detail) for r in records if r.error is not None]
    return Summary(
        duration_s=duration_s,
        sent=len(records),
        completed=len(answered),
        errors=dict(Counter(kind for kind, _ in failed).most_common()),
        input_tokens=sum(r.prompt_tokens or 0 for r in answered),
        cached_tokens=sum(r.cached_tokens for r in answered),
        output_tokens=num_tokens,
        good=sum(is_good(r, slos) for r in answered) if slos else None,
        ttft=Distribution.of(_ms(r.ttft_s) for r in answered),
        tpot=Distribution.of(_ms(r.tpot_s) for r in answered if r.tpot_s is not None),
        itl=Distribution.of(_ms(gap_s) for r in answered for gap_s in r.gaps_s),
        e2el=Distribution.of(_ms(r.e2e_s) for r in answered),
        scheduled_ttft=Distribution.of(_ms(r.token_s[0] - r.scheduled_s) for r in answered),
        scheduled_e2el=Distribution.of(_ms(r.token_s[-1] - r.scheduled_s) for r in answered),
        lateness=Distribution.of(late),
        lag=Distribution.of(lag_ms for phase in phases for lag_ms in phase.lag_ms),
        cpu_share=sum(phase.cpu_s for phase in phases) / duration_s if duration_s else 0.0,
        max_concurrent=max((max_concurrent(phase.records) for phase in phases), default=0),
        max_output_tokens_per_s=max((_peak(phase) for phase in phases), default=0.0),
        tokens_per_event=num_tokens / num_events if num_events else None,
        counted=sorted({r.counted for r in answered}),
        details={kind: detail for kind, detail in reversed(failed) if kind is not None},
    )


def is_good(record: Record, slos: Mapping[str, float] | None) -> bool:
    """Whether an answer met every SLO. ttft and e2el count from the schedule; itl is its longest gap.

    An answer of one token has no tpot and no itl, and meets those.
    """
    times_s = {
        "ttft": record.token_s[0] - record.scheduled_s,
        "tpot": record.tpot_s or 0.0,
        "itl": max(record.gaps_s, default=0.0),
        "e2el": record.token_s[-1] - record.scheduled_s,
    }
    return all(_ms(times_s[name]) <= limit_ms for name, limit_ms in (slos or {}).items())


def read_slos(words: Sequence[str]) -> dict[str, float]:
    """{"ttft": 200.0, ...} of NAME:MILLISECONDS, as `vllm bench serve --goodput` spells it.

    Raises:
        InvalidSettings: a word is not of this form.
    """
    slos = {}
    for word in words:
        name, colon, limit = word.partition(":")
        try:
            slos[name] = float(limit)
        except ValueError:
            colon = ""
        if not colon or name not in SLO_NAMES or not slos[name] >= 0:
            raise InvalidSettings(
                f"--goodput {word!r} is no limit; write NAME:MILLISECONDS with a name of {', '.join(SLO_NAMES)}, "
                "such as ttft:200 tpot:20"
            )
    return slos


def mean_in_flight(records: Sequence[Record], from_s: float, to_s: float) -> float:
    """Requests that were sent and had no end, averaged over this time."""
    spans = (min(to_s if r.end_s is None else r.end_s, to_s) - max(r.sent_s, from_s) for r in records)
    return sum(span for span in spans if span > 0) / (to_s - from_s)


def max_concurrent(records: Sequence[Record]) -> int:
    """The most requests in flight at any time."""
    edges = [(r.sent_s, 1) for r in records] + [(r.end_s, -1) for r in records if r.end_s is not None]
    most = now = 0
    for _, change in sorted(edges):
        now += change
        most = max(most, now)
    return most


def why_saturated(phases: Sequence[Phase], slos: Mapping[str, float] | None = None) -> str | None:
    """Why the server does not keep up with these open-loop phases, in words; None if it does."""
    records = [record for phase in phases for record in phase.records]
    num_failed = sum(record.error is not None for record in records)
    if num_failed > MAX_ERROR_SHARE * len(records):
        return f"{num_failed} of {len(records)} requests failed"
    if slos:
        num_good = sum(is_good(record, slos) for record in records if record.is_answered)
        if num_good < GOOD_SHARE * len(records):
            return f"{num_good} of {len(records)} requests met the SLOs"
    grown, arrived = map(sum, zip(*(_backlog(phase.records) for phase in phases), strict=True))
    if grown >= MIN_BACKLOG and grown > MAX_BACKLOG_SHARE * arrived:
        return f"{grown:.1f} more requests in flight after half of the arrivals, of {arrived:g} that arrived meanwhile"
    return None


def why_invalid(summary: Summary, limit_ms: float) -> str | None:
    """Why the generator itself was too slow for its figures to count, in words; None if it kept up."""
    found = (("requests were sent late", summary.lateness), ("the generator's event loop woke late", summary.lag))
    for what, late in found:
        if late is not None and late.p99 > limit_ms:
            return f"{what}: p99 {late.p99:.1f} ms, above the limit of {limit_ms:g} ms"
    return None


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below; None where one is missing or below is 0."""
    return None if above is None or not below or math.isnan(above) else above / below


def _backlog(records: Sequence[Record]) -> tuple[float, int]:
    """By how much the requests in flight grew from the second to the last quarter of arrivals; arrivals in half."""
    first_s, last_s = min(r.scheduled_s for r in records), max(r.scheduled_s for r in records)
    quarter_s = (last_s - first_s) / 4
    if quarter_s <= 0:
        return 0.0, len(records)
    half_s = first_s + 2 * quarter_s
    earlier = mean_in_flight(records, half_s - quarter_s, half_s)
    later = mean_in_flight(records, last_s - quarter_s, last_s)
    return later - earlier, sum(r.scheduled_s > half_s for r in records)


def _peak(phase: Phase) -> float:
    """The most output tokens in one of the phase's seconds, as vllm counts them."""
    tokens: defaultdict[int, float] = defaultdict(float)
    for record in phase.records:
        if record.is_answered:
            # Where events bring several tokens and do not tell how many, each has the same share.
            share = record.output_tokens / len(record.token_s)
            for time_s in record.token_s:
                tokens[int(time_s - phase.started_s)] += share
    return max(tokens.values(), default=0.0)


def _ms(seconds: float) -> float:
    return seconds * 1e3
