"""Lines about an answer: its times, and the comparison with the baseline."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from unicodedata import category

from service.web.schemas.generate import Answer, GenerateResponse

AROUND_CHARS = 32
"""Characters of each text to show from where they differ."""

NOTHING = "-"


def metrics_line(answer: Answer) -> str:
    """TTFT, tokens/s, tokens, and the finish reason unless it is stop."""
    metrics = answer.metrics
    ttft = NOTHING if metrics.ttft_ms is None else f"{metrics.ttft_ms:.0f} ms"
    rate = NOTHING if metrics.tokens_per_s is None else f"{metrics.tokens_per_s:.1f}"
    cut = "" if answer.finish_reason == "stop" else f" · ended by {answer.finish_reason}"
    return f"{answer.variant} · TTFT {ttft} · {rate} tokens/s · {metrics.generated_tokens} tokens{cut}"


def comparison_lines(answer: GenerateResponse) -> Iterator[str]:
    """Speedup, agreement, and where the texts differ; empty without a comparison."""
    if answer.baseline is None or answer.speedup is None or answer.agreement is None:
        return
    faster, alike = answer.speedup, answer.agreement
    contended = " · other requests ran meanwhile: the times are not clean" if answer.contended else ""
    yield (
        f"speed-up {_times(faster.tokens_per_s)} in tokens/s, {_times(faster.ttft)} in TTFT · "
        f"{alike.match_ratio:.0%} of the tokens agree{contended}"
    )
    ours, theirs = answer.text, answer.baseline.text
    if ours == theirs:
        yield "the texts are the same"
        return
    place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    yield (
        f"the texts part after {alike.common_prefix_tokens} tokens: "
        f"{answer.variant} {_excerpt(ours, place)}, {answer.baseline.variant} {_excerpt(theirs, place)}"
    )


def printable(text: str) -> str:
    """The text without control characters, with which a model could control the terminal."""
    return "".join(char if char in "\n\t" or category(char) != "Cc" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def _excerpt(text: str, place: int) -> str:
    """The text from place on, quoted, on one line."""
    end = place + AROUND_CHARS
    return repr(text[place:end]) + ("..." if len(text) > end else "")
