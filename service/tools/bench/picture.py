"""The picture of a run: latency over throughput, and what is served of what arrives. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")

Row = Mapping[str, Any]
"""One load of one name, as in the result file."""


def draw(document: Mapping[str, Any], out: Path) -> None:
    """Draw TTFT and TPOT over output tokens/s, and requests/s served over those that arrive, into a PNG file.

    document: what `report.document` made, or was read from a result file. Points are joined in the order of their load.
    A hollow one is invalid: its generator was late.
    """
    rows: Sequence[Row] = document.get("points", [document])
    run = document["ottava"]
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    first, each, served = figure.subplots(1, 3)
    by_name = {name: [row for row in rows if row["ottava"]["name"] == name] for name, _ in groupby(rows, _name_of)}
    for number, (name, own) in enumerate(by_name.items()):
        colour = COLOURS[number % len(COLOURS)]
        own.sort(key=lambda row: float(row["request_rate"]))
        _latency(first, own, name, "ttft", colour, above=number > 0)
        _latency(each, own, name, "tpot", colour, above=number > 0)
        _served(served, own, name, colour, run["slos_ms"])
    first.set_ylabel("first token (TTFT), ms")
    each.set_ylabel("per token after it (TPOT), ms")
    for axes in (first, each):
        axes.set_xlabel("output tokens/s")
        axes.set_yscale("log")
        # A time of 0, of tokens that came together, has no place on it.
        if math.isfinite(least := float(axes.dataLim.minposy)):
            axes.set_ylim(bottom=least / 2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
    served.set_xlabel("requests/s that arrive")
    served.set_ylabel("requests/s")
    for axes in (first, each, served):
        axes.grid(alpha=0.3, which="both")
        axes.set_xlim(left=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    server = run["server"]
    model = Path(str(server.get("model", run["url"]))).name
    figure.suptitle(" · ".join(filter(None, [model, server.get("device"), run["route"], run["inputs"]])), fontsize=9)
    figure.savefig(out, format="png", dpi=110)


def _name_of(row: Row) -> str:
    return str(row["ottava"]["name"])


def _latency(axes: Axes, rows: Sequence[Row], name: str, time: str, colour: str, *, above: bool) -> None:
    for word, line in (("p50", "-"), ("p99", "--")):
        key = f"{word}_{time}_ms"
        found = [row for row in rows if row[key] is not None]
        xs, ys = [row["output_throughput"] for row in found], [row[key] for row in found]
        axes.plot(xs, ys, line, color=colour, linewidth=1.2, label=f"{name} {word}".strip())
        for row, x, y in zip(found, xs, ys, strict=True):
            _mark(axes, x, y, colour, row)
            if word == "p50" and row["request_rate"] != "inf":
                place = (3, 5 if above else -9)
                axes.annotate(f"{row['request_rate']:.3g}/s", (x, y), place, "data", "offset points", fontsize=7)


def _served(axes: Axes, rows: Sequence[Row], name: str, colour: str, slos_ms: Mapping[str, float]) -> None:
    found = [row for row in rows if row["request_rate"] != "inf"]
    if not found:
        axes.text(0.5, 0.5, "no rate in this run", ha="center", transform=axes.transAxes)
        return
    rates = [row["request_rate"] for row in found]
    axes.plot(rates, [row["request_throughput"] for row in found], "-", color=colour, label=f"{name} answered".strip())
    if slos_ms:
        limits = ", ".join(f"{slo} {limit:g} ms" for slo, limit in slos_ms.items())
        good = [row["request_goodput"] for row in found]
        axes.plot(rates, good, ":", color=colour, label=f"{name} within {limits}".strip())
    for row in found:
        _mark(axes, row["request_rate"], row["request_throughput"], colour, row)
    axes.plot([0, max(rates)], [0, max(rates)], color="lightgrey", linewidth=1, zorder=0)
    axes.set_ylim(bottom=0)


def _mark(axes: Axes, x: float, y: float, colour: str, row: Row) -> None:
    axes.plot([x], [y], "o", color=colour, markersize=4, markerfacecolor=colour if row["ottava"]["valid"] else "white")
