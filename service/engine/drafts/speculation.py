"""Whether draft tokens pay: expected tokens per second of a step with them, and of one without.

A request that drafts must wait until the host has read its last tokens, so the next step cannot be planned while one
is running. What that costs is in the times of real steps, which are measured from one step's results to the next's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from service.engine.drafts.drafter import Drafter
from service.engine.request import Request
from service.engine.shapes import DECODES, Shape

MIN_CHANCE = 0.3
"""A token is drafted only if it is at least this likely to be right, going by the hit rate."""

MARGIN = 1.1
"""How many times as many tokens per second drafts must promise: both sides of the comparison are estimates."""

WEIGHT = 0.25
"""Share of the last step in the time of steps of its size."""

SLOWEST = 2.0
"""Most that a step may take of what such steps took before, to be believed: beyond it something else was in its way."""

TRIAL_EVERY, TRIAL_LENGTH = 256, 4
"""So many decisions out of so many go the other way, since a time that is no longer measured becomes outdated."""


class Speculation:
    """Chooses how many draft tokens each request of a step computes.

    Args:
        max_draft_tokens: most draft tokens of a request in a step.
        max_rows: most rows of a step with drafts.
        step_times_s: seconds of a step of each captured shape; empty if steps are not captured.
        min_chance: see `MIN_CHANCE`.
    """

    def __init__(
        self,
        max_draft_tokens: int,
        max_rows: int,
        step_times_s: Mapping[Shape, float] | None = None,
        min_chance: float = MIN_CHANCE,
    ) -> None:
        sizes = {shape.num_tokens: time_s for shape, time_s in (step_times_s or {}).items() if shape.is_decode}
        self.max_rows = min(max_rows, max(sizes, default=max_rows))
        self._limits = [max_draft_tokens >> halvings for halvings in range(max_draft_tokens.bit_length())]
        # (rows as `_size_of` rounds them, whether some are drafts) -> seconds.
        self._times_s = {(size, drafts): time_s for size, time_s in sizes.items() for drafts in (False, True)}
        self._min_chance = min_chance
        self._num_decisions = 0

    def plan(self, requests: Sequence[Request]) -> dict[Request, int]:
        """How many tokens each request should draft in the next step, in which these requests decode.

        Empty if that does not pay, and always if there is no room for a draft of each.
        """
        if 2 * len(requests) > self.max_rows:
            return {}
        drafters = [(request, _drafter_of(request)) for request in requests if request.can_draft]
        # The usual case is that nobody has anything to draft; then there is no more to do.
        drafters = [pair for pair in drafters if pair[1].outlook(1, self._min_chance)[0]]
        plans = [plan for limit in self._limits if (plan := self._planned(requests, drafters, limit))[0]]
        if not plans:
            return {}
        rates = [self._rate(len(requests) + sum(depths.values()), True, expected) for depths, expected in plans]
        best = max(rates)
        pays = best > MARGIN * self._rate(len(requests), False, len(requests))
        self._num_decisions += 1
        if self._num_decisions % TRIAL_EVERY >= TRIAL_EVERY - TRIAL_LENGTH:
            pays = not pays
        return plans[rates.index(best)][0] if pays else {}

    def observe(self, num_rows: int, has_drafts: bool, time_s: float) -> None:
        """Learn from the time of a step of decodes."""
        key = _size_of(num_rows), has_drafts
        before_s = self._times_s.get(key, time_s)
        self._times_s[key] = before_s + WEIGHT * (min(time_s, SLOWEST * before_s) - before_s)

    def _planned(
        self, requests: Sequence[Request], drafters: Sequence[tuple[Request, Drafter]], limit: int
    ) -> tuple[dict[Request, int], float]:
        """Draft tokens of each request, at most limit, and the tokens that such a step yields on average."""
        num_free, depths, tokens = self.max_rows - len(requests), {}, float(len(requests))
        for request, drafter in drafters:
            num_wanted = request.params.max_tokens - request.num_generated - 1
            depth, expected = drafter.outlook(min(limit, num_wanted, num_free), self._min_chance)
            if depth > 0:
                depths[request], tokens, num_free = depth, tokens + expected, num_free - depth
        return depths, tokens

    def _rate(self, num_rows: int, has_drafts: bool, num_tokens: float) -> float:
        """Tokens per second. Infinite if no such step has been measured, so that one will be."""
        time_s = self._times_s.get((_size_of(num_rows), has_drafts))
        return num_tokens / time_s if time_s else float("inf")


def _size_of(num_rows: int) -> int:
    """The captured size of so many rows: steps up to it take about the same time."""
    place = bisect_left(DECODES, num_rows)
    return DECODES[place] if place < len(DECODES) else num_rows


def _drafter_of(request: Request) -> Drafter:
    """The request's drafter, which knows all tokens that the host has read."""
    if request.drafter is None:
        request.drafter = Drafter(request.prompt_ids)
    for token_id in request.output_ids[len(request.drafter) - len(request.prompt_ids) :]:
        request.drafter.add(token_id)
    return request.drafter
