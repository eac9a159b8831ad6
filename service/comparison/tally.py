"""Records comparisons with the baseline: each in the metrics, and a summary of the latest."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean, median

from pydantic import BaseModel, Field

from service.measures import Agreement, Speedup
from service.telemetry.metrics import HOWS, How, ServiceMetrics

WINDOW = 1000
"""Comparisons in a summary: enough for a median, recent enough to show a change of load or checkpoint."""


class ComparisonSummary(BaseModel):
    """A summary of at most a thousand latest comparisons of one origin with the baseline."""

    count: int = Field(description="Comparisons since the start.")
    contended: int = Field(description="Of these, how many ran beside other requests; left out of the speed-up.")
    unequal: int = Field(
        description="Of these, how many found more of their prompt in one variant's cache than in the other's; "
        "left out of the speed-up."
    )
    speedup_median: Speedup = Field(description="Of the others; above 1 is better; null if there are none.")
    agreement_mean: float | None = Field(description="Mean share of tokens equal to the baseline's; null: none yet.")
    identical_ratio: float | None = Field(description="Share of answers that equal the baseline's token by token.")


@dataclass(slots=True)
class _Tally:
    """Comparisons of one origin."""

    count: int = 0
    num_contended: int = 0
    num_unequal: int = 0
    agreements: deque[Agreement] = field(default_factory=lambda: deque(maxlen=WINDOW))
    speedups: deque[Speedup] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, speedup: Speedup, agreement: Agreement, is_contended: bool, is_unequal: bool) -> None:
        self.count += 1
        self.agreements.append(agreement)
        self.num_contended += is_contended
        self.num_unequal += is_unequal
        if not is_contended and not is_unequal:
            self.speedups.append(speedup)

    def summary(self) -> ComparisonSummary:
        ratios = [agreement.match_ratio for agreement in self.agreements]
        return ComparisonSummary(
            count=self.count,
            contended=self.num_contended,
            unequal=self.num_unequal,
            speedup_median=Speedup(
                **{name: _median(getattr(speedup, name) for speedup in self.speedups) for name in Speedup.model_fields}
            ),
            agreement_mean=fmean(ratios) if ratios else None,
            identical_ratio=fmean(ratio == 1 for ratio in ratios) if ratios else None,
        )


class Comparisons:
    """All comparisons of this process by origin: requested with `compare`, or replayed in shadow mode.

    Agreement always counts, as it does not depend on time. Speedup counts only if both runs had the device to
    themselves, as the baseline runs alone and a run that shared its steps would look too slow, and if both began with
    as much of the prompt in the prefix cache.
    """

    def __init__(self, metrics: ServiceMetrics) -> None:
        self._metrics = metrics
        self._tallies = {how: _Tally() for how in HOWS}

    def add(
        self,
        how: How,
        variant: str,
        speedup: Speedup,
        agreement: Agreement,
        *,
        is_contended: bool,
        is_unequal: bool = False,
    ) -> None:
        """Add a comparison of a variant with the baseline.

        Args:
            is_contended: other requests ran meanwhile.
            is_unequal: one of the two began with more of the prompt in the prefix cache.
        """
        self._metrics.compared(how, variant, None if is_contended or is_unequal else speedup, agreement)
        self._tallies[how].add(speedup, agreement, is_contended, is_unequal)

    def summary(self) -> dict[How, ComparisonSummary]:
        """Medians and means over the last WINDOW comparisons of each origin."""
        return {how: tally.summary() for how, tally in self._tallies.items()}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
