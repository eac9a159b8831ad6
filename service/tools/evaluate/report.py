"""The output of `ottava evaluate`: the table of schemes, the worst Linears and layers, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from rich.table import Table

from service.tools.evaluate.quality import Row
from service.tools.evaluate.speed import SPEED_OF

WORST_LINEARS = 20
"""Most Linears in the table; the JSON contains all."""


def quality_table(rows: Sequence[Row], device: str) -> Table:
    """One row per scheme, the float model first."""
    num_tokens, num_questions = rows[0].num_tokens, rows[0].num_questions
    measured = f"{num_tokens} tokens" + (f" and {num_questions} questions" if num_questions else "")
    table = Table(title=f"quality over {measured}; tokens/s on {device}: {SPEED_OF}; ranges: 95 % over windows")
    table.add_column("scheme", no_wrap=True)
    headings = ["perplexity", "vs. float", "KL (nats)", "top-1 agreement"]
    headings += ["choices right", "same choice"] * bool(num_questions)
    for heading in (*headings, "weights, MB", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        # The baseline is exactly itself.
        ranges = (None, None) if row is rows[0] else (row.perplexity_ratio_interval, row.kl_interval)
        ratio, kl = ("" if ends is None else "\n{:.4f}-{:.4f}".format(*ends) for ends in ranges)
        cells = [f"{row.perplexity:.2f}", f"{row.perplexity_ratio:.4f}{ratio}", f"{row.kl:.4f}{kl}"]
        cells.append(f"{row.top1_agreement:.1%}")
        if row.choice_accuracy is not None and row.choice_agreement is not None:
            cells += [f"{row.choice_accuracy:.1%}", f"{row.choice_agreement:.1%}"]
        table.add_row(row.scheme, *cells, f"{row.weight_bytes / 1e6:.1f}", f"{row.tokens_per_s:.1f}")
    return table


def line(row: Row) -> str:
    """A row in one line, for printing as soon as it is known."""
    return (
        f"{row.scheme}: perplexity {row.perplexity:.2f} ({row.perplexity_ratio - 1:+.2%}), KL {row.kl:.4f} nats, "
        f"top-1 agreement {row.top1_agreement:.1%}, {row.tokens_per_s:.1f} tokens/s"
    )


def layer_tables(row: Row) -> Iterator[Table]:
    """The Linears of one scheme, the worst first, and the hidden states' error after each layer."""
    shown = row.linear_errors[:WORST_LINEARS]
    table = Table(title=f"{row.scheme}: the {len(shown)} worst of {len(row.linear_errors)} Linears")
    table.add_column("Linear")
    table.add_column("error of its output", justify="right")
    for linear in shown:
        table.add_row(linear.name, f"{linear.error:.2%}")
    yield table
    table = Table(title=f"{row.scheme}: hidden states")
    for heading in ("after layer", "error", "grown by"):
        table.add_column(heading, justify="right")
    for index, (before, error) in enumerate(pairwise((0.0, *row.hidden_errors))):
        table.add_row(str(index), f"{error:.2%}", f"{error - before:+.2%}")
    yield table


def layer_verdict(row: Row) -> str:
    """Two sentences on the Linear and the layer with the largest errors."""
    worst = row.linear_errors[0]
    typical = median(linear.error for linear in row.linear_errors)
    steps = list(pairwise((0.0, *row.hidden_errors)))
    index = max(range(len(steps)), key=lambda i: steps[i][1] - steps[i][0])
    before, after = steps[index]
    return (
        f"{row.scheme}: {worst.name} hurts most: its int8 output is {worst.error:.2%} off its float one, "
        f"{worst.error / typical:.1f} times the median Linear ({typical:.2%}). "
        f"The hidden states' error grows most in layer {index}, from {before:.2%} to {after:.2%}."
    )


def as_json(certificate: dict[str, Any], rows: Sequence[Row]) -> str:
    """A JSON object of the run and the rows."""
    run = certificate | {"tokens_per_s": SPEED_OF}
    return json.dumps({"run": run, "rows": [row.as_json() for row in rows]}, indent=1) + "\n"
