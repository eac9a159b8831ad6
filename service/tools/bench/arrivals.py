"""When requests are sent: drawn before the first one goes out, so that no answer can delay an arrival."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from random import Random


@dataclass(frozen=True, slots=True)
class Rate:
    """Open loop: rate requests/s arrive at random, whether or not earlier ones are answered.

    burstiness: shape of the gamma distribution of the gaps. 1: a Poisson process; below: in bursts; above: more even;
    infinite: a fixed gap.
    """

    rate: float
    burstiness: float = 1.0

    def __str__(self) -> str:
        return f"{self.rate:.4g} requests/s"


@dataclass(frozen=True, slots=True)
class Concurrency:
    """Closed loop: so many requests at any time; each answer sends the next one."""

    streams: int

    def __str__(self) -> str:
        return f"{self.streams} at a time"


@dataclass(frozen=True, slots=True)
class Burst:
    """All requests at once."""

    def __str__(self) -> str:
        return "all at once"


Load = Rate | Concurrency | Burst


def arrival_times(load: Rate | Burst, count: int, rng: Random) -> list[float]:
    """[count] seconds after the start, ascending.

    Gaps are Gamma(shape burstiness, mean 1 / rate), scaled so that the last of count requests arrives at count / rate,
    as `vllm bench serve` does: a Poisson process, given how many arrive by then. So a point has the rate it is named
    after, however few requests it has.
    """
    if isinstance(load, Burst):
        return [0.0] * count
    shape = load.burstiness
    gaps = [1.0 if math.isinf(shape) else rng.gammavariate(shape, 1.0 / shape) for _ in range(count)]
    drawn = list(accumulate(gaps))
    scale = count / load.rate / drawn[-1] if drawn and drawn[-1] > 0 else 0.0
    return [time_s * scale for time_s in drawn]
