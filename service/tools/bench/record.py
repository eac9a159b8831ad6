"""What became of one request."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import StrEnum


class Counted(StrEnum):
    """How an answer's tokens were counted."""

    IDS = "token ids"
    USAGE = "usage"
    EVENTS = "events, since the server told no usage"


@dataclass(slots=True)
class Record:
    """Times are seconds of one monotonic clock.

    scheduled_s: when it was to be sent. sent_s: when it was, before a connection was opened for it if none was free.
    token_s: when each token came, or where `counted` is not IDS, each event that brought text.
    error: kind of failure; None if the answer came to its end.
    cached_tokens: those of the prompt that the server found in its prefix cache.
    """

    scheduled_s: float
    sent_s: float
    prompt_tokens: int | None = None
    output_tokens: int = 0
    token_s: array[float] = field(default_factory=lambda: array("d"))
    end_s: float | None = None
    error: str | None = None
    detail: str = ""
    counted: Counted = Counted.EVENTS
    cached_tokens: int = 0

    @property
    def is_answered(self) -> bool:
        return self.end_s is not None and self.error is None

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.token_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """(last - first) / (tokens - 1); None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Between successive entries of token_s."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]
