"""How many tokens a step may have, so that answers do not stall while prompts are read."""

from __future__ import annotations

from collections.abc import Mapping

from service.engine.shapes import Shape

MIN_CHUNK = 64
"""Prompt tokens that a step has room for even if it then takes longer than the target: prompts must go on."""

WEIGHT = 0.1
"""Share of the last step in the ratio of real times to measured ones."""

SLOWEST = 8.0
"""Largest such ratio. Beyond it a step was delayed by something else than its keys."""


class Pacing:
    """Chooses the token budget of each step.

    While requests decode, that is the largest measured step whose time stays under the target; otherwise max_tokens.
    The times are those of steps with nothing before them in the cache. Real steps attend to more keys, so the times
    are scaled by how long the last real ones took.

    Args:
        max_tokens: largest budget.
        target_s: longest step while requests decode, in seconds; None for any.
        times_s: seconds of a step of each shape; without any every step may have max_tokens.
    """

    def __init__(self, max_tokens: int, target_s: float | None = None, times_s: Mapping[Shape, float] | None = None):
        self.max_tokens = max_tokens
        self._target_s = target_s
        self._times_s = {shape: time_s for shape, time_s in (times_s or {}).items() if not shape.is_decode}
        self._slowest: dict[int, float] = {}
        for shape, time_s in sorted(self._times_s.items()):
            self._slowest[shape.num_tokens] = max(time_s, self._slowest.get(shape.num_tokens, 0.0))
        self._ratio = 1.0

    def budget(self, num_decoding: int) -> int:
        """Most tokens of the next step, in which so many requests decode."""
        if self._target_s is None or not self._slowest or not num_decoding:
            return self.max_tokens
        fitting = [tokens for tokens, time_s in self._slowest.items() if time_s * self._ratio <= self._target_s]
        return min(self.max_tokens, max(num_decoding + MIN_CHUNK, *fitting, 0))

    def observe(self, shape: Shape, time_s: float) -> None:
        """Learn from the time that a real step of a shape took on the device."""
        measured_s = self._times_s.get(shape)
        if measured_s:
            self._ratio += WEIGHT * (min(time_s / measured_s, SLOWEST) - self._ratio)
