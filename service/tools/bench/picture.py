"""The picture of a run: latency over throughput, and what is served of what arrives. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from service.tools.bench.arrivals import Rate
from service.tools.bench.bench import Point, Result

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


def draw(result: Result, out: Path) -> None:
    """Draw TTFT and TPOT over output tokens/s, and requests/s served over those that arrive, into a PNG file.

    Points are joined in the order of their load. A hollow one is invalid: its generator was late.
    """
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    first, each, served = figure.subplots(1, 3)
    for name, colour in zip(result.names, COLOURS, strict=False):
        _latency(first, result, name, "ttft", colour)
        _latency(each, result, name, "tpot", colour)
        _served(served, result, name, colour)
    first.set_ylabel("first token (TTFT), ms")
    each.set_ylabel("per token after it (TPOT), ms")
    for axes in (first, each):
        axes.set_xlabel("output tokens/s")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=_floor(axes))
    served.set_xlabel("requests/s that arrive")
    served.set_ylabel("requests/s")
    for axes in (first, each, served):
        axes.grid(alpha=0.3, which="both")
        axes.set_xlim(left=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    device = result.info.get("device", "")
    model = Path(str(result.info.get("model", result.bench.target.url))).name
    figure.suptitle(" · ".join(filter(None, [model, str(device), result.bench.route, result.material])), fontsize=9)
    figure.savefig(out, format="png", dpi=110)


def _latency(axes: Axes, result: Result, name: str, time: str, colour: str) -> None:
    for word, line in (("p50", "-"), ("p99", "--")):
        xs, ys = [], []
        for point in _in_order(result):
            summary = result.summary(point, name)
            found = getattr(summary, time)
            if found is None:
                continue
            xs.append(summary.per_s(summary.output_tokens))
            ys.append(getattr(found, word))
            _mark(axes, xs[-1], ys[-1], colour, is_valid=result.why_invalid(point, name) is None)
            if word == "p50" and isinstance(point.load, Rate):
                axes.annotate(
                    f"{point.load.rate:.3g}/s", (xs[-1], ys[-1]), (3, -9), "data", "offset points", fontsize=7
                )
        axes.plot(xs, ys, line, color=colour, linewidth=1.2, label=f"{name} {word}".strip())


def _served(axes: Axes, result: Result, name: str, colour: str) -> None:
    points = [point for point in _in_order(result) if isinstance(point.load, Rate)]
    rates = [point.load.rate for point in points if isinstance(point.load, Rate)]
    summaries = [result.summary(point, name) for point in points]
    if not rates:
        axes.text(0.5, 0.5, "no rate in this run", ha="center", transform=axes.transAxes)
        return
    axes.plot(rates, [s.per_s(s.completed) for s in summaries], "-", color=colour, label=f"{name} answered".strip())
    if result.bench.slos:
        limits = ", ".join(f"{slo} {limit:g} ms" for slo, limit in result.bench.slos.items())
        good = [s.per_s(s.good or 0) for s in summaries]
        axes.plot(rates, good, ":", color=colour, label=f"{name} within {limits}".strip())
    for point, rate, summary in zip(points, rates, summaries, strict=True):
        is_valid = result.why_invalid(point, name) is None
        _mark(axes, rate, summary.per_s(summary.completed), colour, is_valid=is_valid)
    axes.plot([0, max(rates)], [0, max(rates)], color="lightgrey", linewidth=1, zorder=0)
    axes.set_ylim(bottom=0)


def _mark(axes: Axes, x: float, y: float, colour: str, *, is_valid: bool) -> None:
    axes.plot([x], [y], "o", color=colour, markersize=4, markerfacecolor=colour if is_valid else "white")


def _in_order(result: Result) -> list[Point]:
    return sorted(result.points, key=lambda point: point.load.rate if isinstance(point.load, Rate) else 0.0)


def _floor(axes: Axes) -> float:
    """Half of the lowest value shown, so that curves do not stand on the axis."""
    return float(axes.dataLim.y0) / 2
