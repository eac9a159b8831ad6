"""The plot of `ottava evaluate`: quality and speed of each scheme. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from service.tools.evaluate.quality import Row
from service.tools.evaluate.speed import SPEED_OF

FLOAT_COLOUR, INT8_COLOUR = "tab:grey", "tab:blue"
ROW_INCHES = 0.28


def draw(rows: Sequence[Row], out: Path, title: str) -> None:
    """Draw bars of perplexity, KL divergence, agreement and speed, one per scheme, into a PNG file."""
    figure = Figure(figsize=(14, 1.8 + ROW_INCHES * len(rows)), layout="constrained")
    cost, kl, agreement, speed = figure.subplots(1, 4, sharey=True)
    # Beyond these values the axes are logarithmic, because one very bad scheme would make the other bars invisible.
    _bars(
        cost,
        rows,
        lambda row: 100 * (row.perplexity_ratio - 1),
        "perplexity over float's, %",
        form="{:+.1f}",
        linear_up_to=1.0,
        ends=lambda row: tuple(100 * (end - 1) for end in row.perplexity_ratio_interval or ()),
    )
    _bars(
        kl,
        rows,
        lambda row: row.kl,
        "KL divergence, nats",
        form="{:.4f}",
        linear_up_to=0.1,
        ends=lambda row: row.kl_interval or (),
    )
    _bars(agreement, rows, lambda row: 100 * row.top1_agreement, "same likeliest token, %", form="{:.1f}")
    _bars(speed, rows, lambda row: row.tokens_per_s, "tokens/s", form="{:.1f}")
    cost.set_yticks(range(len(rows)), [row.scheme for row in rows], fontsize=8)
    cost.invert_yaxis()
    figure.suptitle(f"{title}\ntokens/s: {SPEED_OF}", fontsize=9)
    figure.savefig(out, format="png", dpi=110)


def spread(values: Sequence[float], ends: Sequence[Sequence[float]]) -> list[list[float]]:
    """The lengths of error bars as matplotlib takes them, from each value down and up to the ends of its interval."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    return [below, [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]]


def _bars(
    axes: Axes,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    title: str,
    *,
    form: str,
    linear_up_to: float | None = None,
    ends: Callable[[Row], Sequence[float]] = lambda _: (),
) -> None:
    values = [value(row) for row in rows]
    # An infinite perplexity has no bar, only a label.
    widths = [found if math.isfinite(found) else 0.0 for found in values]
    colours = [FLOAT_COLOUR, *[INT8_COLOUR] * (len(rows) - 1)]
    intervals = [ends(row) or (width, width) for row, width in zip(rows, widths, strict=True)]
    lengths = spread(widths, intervals) if any(map(ends, rows)) else None
    bars = axes.barh(range(len(rows)), widths, color=colours, xerr=lengths, error_kw={"lw": 0.8})
    axes.bar_label(bars, [form.format(found) for found in values], fontsize=7, padding=2)
    if linear_up_to is not None:
        axes.set_xscale("symlog", linthresh=linear_up_to)
        axes.xaxis.set_major_formatter("{x:g}")
    longest = max(*widths, linear_up_to or 0.0)
    axes.set_xlim(right=longest * (1.25 if linear_up_to is None else 8.0))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3, axis="x")
