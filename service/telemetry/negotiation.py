"""Chooses between the two expositions of the metrics by a request's Accept header."""

from __future__ import annotations

from contextlib import suppress

OPENMETRICS, TEXT = "application/openmetrics-text", "text/plain"


def prefers_openmetrics(accept: str) -> bool:
    """Whether a client that sent this Accept header reads OpenMetrics, and no less gladly than Prometheus' text."""
    weights: dict[str, float] = {}
    for choice in accept.split(","):
        name, *parameters = (part.strip().lower() for part in choice.split(";"))
        weights[name] = max(weights.get(name, 0.0), _weight(parameters))
    ours = weights.get(OPENMETRICS, 0.0)
    return ours > 0 and ours >= weights.get(TEXT, 0.0)


def _weight(parameters: list[str]) -> float:
    """The q of a choice; 1 if it has none, and 0 if that is no number."""
    weight = next((value for name, _, value in (text.partition("=") for text in parameters) if name == "q"), "1")
    with suppress(ValueError):
        return float(weight)
    return 0.0
