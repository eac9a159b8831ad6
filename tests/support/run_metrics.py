"""Run metrics with some of their values."""

from typing import Any

from service.measures import RunMetrics


def metrics_with(**fields: Any) -> RunMetrics:
    empty = dict.fromkeys(RunMetrics.model_fields)
    counts = {"prompt_tokens": 1, "generated_tokens": 1, "cached_tokens": 0, "accepted_tokens": 0}
    return RunMetrics(**empty | counts | {"batch_size_mean": 1.0} | fields)
