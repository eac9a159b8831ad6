"""How many tokens a step may have, so that answers do not stall while prompts are read."""

from __future__ import annotations

from collections.abc import Mapping

from service.engine.shapes import Shape

MIN_CHUNK = 64
"""Prompt tokens that a step has room for even if it then takes longer than the target: prompts must go on."""

WEIGHT = 0.1
"""Share of the last step in the ratio of real times to measured ones."""

FAST_ENOUGH = 0.97
"""Share of the best rate, in tokens per second, that a larger step must have: some sizes are just beyond where the
products' tiles begin another wave, and then the next smaller step reads more."""

SLOWEST = 8.0
"""Largest such ratio. Beyond it a step was delayed by something else than its keys."""


TARGET_S = 0.025
STEPS_PER_TARGET = 4
"""How many of a model's shortest steps fit into its target at least: with fewer nearly all of a step's time would go to
its decodes, and prompts would wait."""


MOST_TARGET_S = 0.05
"""But no more than the time between tokens that the alerts of `docker/prometheus` allow."""


def default_target_s(times_s: Mapping[Shape, float]) -> float:
    """The target of a model whose captured steps take this long, unless its operator says another."""
    return min(MOST_TARGET_S, max(TARGET_S, STEPS_PER_TARGET * min(times_s.values(), default=0.0)))


class Pacing:
    """Chooses the token budget of each step.

    That is the largest measured step that is about as fast, per token, as any; while requests decode, of those whose
    time stays under the target. The times are those of steps with nothing before them in the cache. Real steps attend
    to more keys, so the times are scaled by how long the last real ones took.

    Args:
        max_tokens: largest budget.
        target_s: longest step while requests decode, in seconds; None for any.
        times_s: seconds of a step of each shape; without any every step may have max_tokens.
    """

    def __init__(self, max_tokens: int, target_s: float | None = None, times_s: Mapping[Shape, float] | None = None):
        self.max_tokens = max_tokens
        self._target_s = target_s
        self._times_s = {shape: time_s for shape, time_s in (times_s or {}).items() if not shape.is_decode}
        # Tokens per second of steps of so many tokens, for as many requests as may share a step.
        self._rates: dict[int, float] = {}
        for shape, time_s in self._times_s.items():
            rate = shape.num_tokens / time_s
            self._rates[shape.num_tokens] = min(rate, self._rates.get(shape.num_tokens, rate))
        self._ratio = 1.0

    def budget(self, num_decoding: int) -> int:
        """Most tokens of the next step, in which so many requests decode."""
        if not self._rates:
            return self.max_tokens
        limit_s = self._target_s / self._ratio if num_decoding and self._target_s is not None else float("inf")
        fitting = {tokens: rate for tokens, rate in self._rates.items() if tokens <= limit_s * rate}
        fast = FAST_ENOUGH * max(fitting.values(), default=0.0)
        largest = max((tokens for tokens, rate in fitting.items() if rate >= fast), default=0)
        return min(self.max_tokens, max(num_decoding + MIN_CHUNK, largest))

    def observe(self, shape: Shape, time_s: float) -> None:
        """Learn from the time that a real step of a shape took on the device."""
        measured_s = self._times_s.get(shape)
        if measured_s:
            self._ratio += WEIGHT * (min(time_s / measured_s, SLOWEST) - self._ratio)
