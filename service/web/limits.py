"""Limits per API key, and how long a refused client should wait."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from service.engine.api import EngineStats
from service.errors import InvalidRequest, RateLimited

MAX_RETRY_AFTER_S = 600
PACE_WEIGHT = 0.1


class TokenBucket:
    """A token bucket: holds at most `capacity` tokens and refills by `rate_per_s` every second."""

    def __init__(self, capacity: float, rate_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._rate_per_s = rate_per_s
        self._clock = clock
        self._tokens = capacity
        self._filled_s = clock()

    def take(self) -> float:
        """Take a token. Returns 0, or if there is none, the seconds until the next one."""
        now_s = self._clock()
        self._tokens = min(self._capacity, self._tokens + (now_s - self._filled_s) * self._rate_per_s)
        self._filled_s = now_s
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate_per_s
        self._tokens -= 1
        return 0.0


class Pace:
    """An exponentially weighted mean, per variant, of how long requests run from first step to end."""

    def __init__(self) -> None:
        self._run_s: dict[str, float] = {}

    def add(self, variant: str, run_s: float) -> None:
        """Add a request that ended run_s after its first step."""
        self._run_s[variant] = _moved(self._run_s.get(variant, run_s), run_s)

    def retry_after_s(self, variant: str, stats: EngineStats) -> int:
        """Whole seconds until a request that arrived now would start.

        Of r running requests that take run_s each, one ends every run_s / r seconds. So a request behind w queued ones
        starts after

            (w + 1) * run_s / max(r, 1)        rounded up, from 1 to MAX_RETRY_AFTER_S.
        """
        wait_s = (stats.num_waiting + 1) * self._run_s.get(variant, 0.0) / max(stats.num_running, 1)
        return whole_seconds(wait_s)


class KeyLimits:
    """Limits each API key: answers at a time, and requests per minute. None is no limit.

    A request counts as one answer until its body has been read, then as all that it wants: `n` of each prompt, and two
    for a comparison.

    A whole minute's requests may come at once; after that one is allowed every 60 / per_minute seconds.
    """

    def __init__(
        self, max_concurrent: int | None, per_minute: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_concurrent = max_concurrent
        self._per_minute = per_minute
        self._clock = clock
        self._num_active: Counter[str] = Counter()
        self._mean_s = 0.0
        self._buckets: dict[str, TokenBucket] = {}

    def enter(self, name: str) -> None:
        """Count a request of the key as one running answer until `leave`.

        Raises:
            RateLimited: the key has reached one of its limits. Nothing is counted.
        """
        self._refuse_more(name, 1)
        if self._per_minute is not None:
            bucket = self._buckets.get(name)
            if bucket is None:
                bucket = self._buckets[name] = TokenBucket(self._per_minute, self._per_minute / 60, self._clock)
            wait_s = bucket.take()
            if wait_s > 0:
                raise RateLimited(
                    f"this API key has sent more than its {self._per_minute} requests per minute; "
                    f"the next is free in {wait_s:.1f} s",
                    retry_after_s=whole_seconds(wait_s),
                )
        self._num_active[name] += 1

    def widen(self, name: str, num_answers: int, param: str | None) -> None:
        """Count a request that has entered as so many running answers; `leave` must then be told.

        Raises:
            InvalidRequest: that is above the limit by itself. param: the field that asks for them.
            RateLimited: it is, with the key's other requests. Nothing is counted.
        """
        if self._max_concurrent is not None and num_answers > self._max_concurrent:
            raise InvalidRequest(
                f"the request asks for {num_answers} answers; the limit of an API key is {self._max_concurrent} at a "
                "time, choices, prompts and both runs of a comparison together; ask for fewer",
                param,
            )
        self._refuse_more(name, num_answers - 1)
        self._num_active[name] += num_answers - 1

    def leave(self, name: str, took_s: float, num_answers: int = 1) -> None:
        """Count a request of the key as ended, took_s after it arrived. num_answers: as it was counted last."""
        self._mean_s = _moved(self._mean_s or took_s, took_s)
        self._num_active[name] -= num_answers
        if not self._num_active[name]:
            del self._num_active[name]

    def _refuse_more(self, name: str, num_more: int) -> None:
        """Raise RateLimited if so many more answers would be above the limit."""
        num_active = self._num_active[name]
        if self._max_concurrent is not None and num_active + num_more > self._max_concurrent:
            raise RateLimited(
                f"{num_active} answers to this API key are running, and this request would add {num_more}; the limit "
                f"is {self._max_concurrent} at a time; wait for others to end",
                # Of n running answers that last mean_s each, one ends every mean_s / n.
                retry_after_s=whole_seconds(self._mean_s / max(1, num_active)),
            )


def _moved(mean: float, value: float) -> float:
    return mean + PACE_WEIGHT * (value - mean)


def whole_seconds(seconds: float) -> int:
    """Seconds for Retry-After: rounded up and clamped to 1 .. MAX_RETRY_AFTER_S."""
    return min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S)
