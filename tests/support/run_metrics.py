"""Run metrics with some of their values."""

from typing import Any

from service.measures import RunMetrics


def metrics_with(**fields: Any) -> RunMetrics:
    empty = dict.fromkeys(RunMetrics.model_fields)
    return RunMetrics(
        **{**empty, "prompt_tokens": 1, "generated_tokens": 1, "cached_tokens": 0, "batch_size_mean": 1.0, **fields}
    )
