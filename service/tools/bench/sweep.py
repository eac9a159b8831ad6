"""Which rate a sweep tries next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_DOUBLINGS = 16


class Sweep(Protocol):
    """A sequence of rates."""

    def next_rate(self, saturated: Mapping[float, bool]) -> float | None:
        """The next rate, by what was found at those before; None at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Listed:
    """These rates, whatever is found."""

    rates: Sequence[float]

    def next_rate(self, saturated: Mapping[float, bool]) -> float | None:
        return next((rate for rate in self.rates if rate not in saturated), None)


@dataclass(frozen=True, slots=True)
class Doubling:
    """From start, doubled until saturated; then bisected (by geometric means) between the last rate that was served and
    the first that was not, num_bisections times."""

    start: float
    num_bisections: int = 2

    def next_rate(self, saturated: Mapping[float, bool]) -> float | None:
        served = [rate for rate, is_saturated in saturated.items() if not is_saturated]
        beyond = [rate for rate, is_saturated in saturated.items() if is_saturated]
        if not beyond:
            return self.start * 2 ** len(served) if len(served) < MAX_DOUBLINGS else None
        below = [rate for rate in served if rate < min(beyond)]
        num_doublings = round(math.log2(max(_doubled(saturated, self.start)) / self.start)) + 1
        if not below or len(saturated) - num_doublings >= self.num_bisections:
            return None
        return math.sqrt(max(below) * min(beyond))


def _doubled(rates: Mapping[float, bool], start: float) -> list[float]:
    """Those that are start times a power of two."""
    return [rate for rate in rates if math.log2(rate / start).is_integer()]
