"""Draws the dashboard from a Prometheus, in the dashboard's layout: for pages and reviews where no Grafana runs."""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator

DASHBOARD = Path(__file__).with_name("dashboards") / "ottava.json"
NUM_COLUMNS, COLUMN_PX, ROW_PX, GAP_PX, DPI = 24, 66, 36, 8, 100
BACKGROUND, PANEL, BORDER, TEXT, FAINT = "#111217", "#181b1f", "#2c3033", "#ccccdc", "#8e8e9b"
PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d", "#fade2a")
SHADES = {
    "green": ("#73bf69", "#37872d", "#c8f2c2", "#19730e"),
    "blue": ("#5794f2", "#1f60c4", "#c0d8ff", "#8ab8ff"),
    "red": ("#f2495c", "#c4162a", "#ffa6b0", "#ff7383"),
    "orange": ("#ff9830", "#b85c00", "#ffcb7d", "#e0812c"),
}
"""Colors of Grafana's dark theme."""

SMALL = ((1e-3, 1e3, "m"), (1e-6, 1e6, "μ"))
LARGE = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
BYTES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
RATE_INTERVAL, RANGE = "$__rate_interval", "$__range"


@dataclass(frozen=True)
class Span:
    """What is drawn. start_s, end_s: since 1970."""

    url: str
    start_s: float
    end_s: float
    step_s: float
    rate_interval: str


@dataclass(frozen=True)
class Series:
    """One line of a panel."""

    name: str
    times: list[datetime]
    values: list[float]

    @property
    def last(self) -> float:
        """The last value that is a number; NaN if there is none."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), math.nan)


def main() -> None:
    """Read the arguments, ask, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://localhost:9090", help="its address")
    parser.add_argument("--start", type=float, help="seconds since 1970; an hour before the end if left out")
    parser.add_argument("--end", type=float, default=time.time(), help="seconds since 1970; now if left out")
    parser.add_argument("--rate-interval", default="10s", help="stands for $__rate_interval: four scrapes or more")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    given = parser.parse_args()
    start_s = given.end - 3600 if given.start is None else given.start
    step_s = max(1.0, (given.end - start_s) / 400)
    span = Span(given.prometheus, start_s, given.end, step_s, given.rate_interval)
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    draw(dashboard, span).savefig(given.out, dpi=DPI, facecolor=BACKGROUND)


def draw(dashboard: dict[str, Any], span: Span) -> Figure:
    """The picture of all panels."""
    panels = dashboard["panels"]
    num_rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    width_px, height_px = NUM_COLUMNS * COLUMN_PX + GAP_PX, (num_rows + 1.4) * ROW_PX
    plt.rcParams |= {"font.size": 8.5, "font.family": "sans-serif", "text.color": TEXT, "axes.edgecolor": BORDER}
    figure = plt.figure(figsize=(width_px / DPI, height_px / DPI))
    figure.text(
        GAP_PX * 1.5 / width_px, 1 - 0.65 * ROW_PX / height_px, dashboard["title"], size=13, weight="bold", va="center"
    )
    moments = f"{_moment(span.start_s):%Y-%m-%d %H:%M:%S} to {_moment(span.end_s):%H:%M:%S} UTC"
    figure.text(
        1 - GAP_PX * 1.5 / width_px,
        1 - 0.65 * ROW_PX / height_px,
        moments,
        size=9,
        color=FAINT,
        va="center",
        ha="right",
    )
    for panel in panels:
        place = panel["gridPos"]
        left = (place["x"] * COLUMN_PX + GAP_PX) / width_px
        top = 1 - ((place["y"] + 1.4) * ROW_PX) / height_px
        width = (place["w"] * COLUMN_PX - GAP_PX) / width_px
        height = (place["h"] * ROW_PX - GAP_PX) / height_px
        if panel["type"] == "row":
            figure.text(
                left,
                top - height / 2,
                f"\N{BLACK DOWN-POINTING SMALL TRIANGLE} {panel['title']}",
                size=11,
                weight="bold",
                va="center",
            )
            continue
        frame = figure.add_axes((left, top - height, width, height))
        _frame(frame, panel["title"], place["h"] * ROW_PX - GAP_PX)
        series = [line for target in panel["targets"] for line in fetch(target, span)]
        if panel["type"] == "stat":
            _stat(frame, panel, series)
        else:
            legend_rows = max(1, math.ceil(len(series) / _num_columns(panel, series)))
            inner = _inner(place, width_px, height_px, left=left, top=top, below=30 + 14 * legend_rows)
            _lines(figure.add_axes(inner), panel, series, span)
    return figure


def fetch(target: dict[str, Any], span: Span) -> list[Series]:
    """The lines of one query."""
    seconds = f"{max(1, round(span.end_s - span.start_s))}s"
    expr = target["expr"].replace(RATE_INTERVAL, span.rate_interval).replace(RANGE, seconds)
    expr = expr.replace("$instance", ".*").replace("$variant", ".*")
    asked = {"query": expr, "start": span.start_s, "end": span.end_s, "step": span.step_s}
    with urllib.request.urlopen(f"{span.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}", timeout=60) as answer:
        found = json.load(answer)["data"]["result"]
    return [_series(each, target.get("legendFormat", ""), span) for each in found]


def _series(found: dict[str, Any], legend: str, span: Span) -> Series:
    """A line that is interrupted where a step has no value."""
    name = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda label: found["metric"].get(label[1], ""), legend)
    known = {round((float(at) - span.start_s) / span.step_s): float(value) for at, value in found["values"]}
    steps = range(min(known), max(known) + 1)
    times = [_moment(span.start_s + step * span.step_s) for step in steps]
    return Series(name, times, [known.get(step, math.nan) for step in steps])


def _moment(at_s: float) -> datetime:
    return datetime.fromtimestamp(at_s, UTC)


def _inner(
    place: dict[str, int], width_px: float, height_px: float, *, left: float, top: float, below: float
) -> tuple[float, float, float, float]:
    """Where the lines of a panel go: room for the title above, the ticks at the left, times and legend below."""
    above, beside, right = 30, 70, 14
    width = place["w"] * COLUMN_PX - GAP_PX - beside - right
    height = place["h"] * ROW_PX - GAP_PX - above - below
    return (left + beside / width_px, top - (above + height) / height_px, width / width_px, height / height_px)


def _frame(axes: Axes, title: str, height_px: float) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    box = FancyBboxPatch((0, 0), 1, 1, boxstyle="square,pad=0", transform=axes.transAxes, fc=PANEL, ec=BORDER, lw=0.8)
    axes.add_patch(box)
    axes.text(0.0, 1 - 14 / height_px, f"  {title}", va="center", size=9.5, weight="medium")


def _stat(axes: Axes, panel: dict[str, Any], series: Sequence[Series]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    shown = [line for line in series if math.isfinite(line.last)]
    if not shown:
        axes.text(0.5, 0.42, "No data", ha="center", va="center", color=FAINT, size=12)
    for place, line in enumerate(shown):
        across = (place + 0.5) / len(shown)
        color = _step_color(defaults.get("thresholds", {}).get("steps", []), line.last)
        text = _format(line.last, defaults["unit"], defaults.get("decimals"))
        axes.text(
            across, 0.44, text, ha="center", va="center", color=color, size=20 if len(shown) == 1 else 14, weight="bold"
        )
        if len(shown) > 1:
            axes.text(across, 0.14, line.name, ha="center", va="center", color=FAINT, size=8)


def _step_color(steps: Sequence[dict[str, Any]], value: float) -> str:
    color = "green"
    for step in steps:
        if step.get("value") is None or value >= step["value"]:
            color = step["color"]
    return {"green": PALETTE[0], "red": PALETTE[4], "orange": PALETTE[3], "yellow": PALETTE[1], "text": TEXT}.get(
        color, TEXT
    )


def _lines(axes: Axes, panel: dict[str, Any], series: Sequence[Series], span: Span) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults.get("custom", {})
    axes.set_facecolor(PANEL)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(color=BORDER, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0, labelsize=7.5)
    axes.set_xlim(_moment(span.start_s), _moment(span.end_s))  # type: ignore[arg-type]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _format(value, defaults["unit"], None)))
    most = max(4, panel["gridPos"]["w"] - 2)
    axes.xaxis.set_major_locator(AutoDateLocator(minticks=3, maxticks=most))  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))  # type: ignore[no-untyped-call]
    colors = _colors(panel, series)
    is_stacked = custom.get("stacking", {}).get("mode") == "normal"
    if is_stacked:
        _stack(axes, series, colors)
    else:
        for line, color in zip(series, colors, strict=True):
            axes.plot(line.times, line.values, color=color, lw=1.3, label=line.name)  # type: ignore[arg-type]
            fill = custom.get("fillOpacity", 0) / 100
            if fill:
                axes.fill_between(line.times, line.values, color=color, alpha=fill * 0.6, lw=0)  # type: ignore[arg-type]
    if custom.get("thresholdsStyle", {}).get("mode", "off") != "off":
        for step in defaults["thresholds"]["steps"]:
            if step.get("value") is not None:
                axes.axhline(step["value"], color=PALETTE[4], lw=1, ls=(0, (5, 3)))
    _limit(axes, defaults, axes.get_ylim()[1] if is_stacked else None, series)
    if series:
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.13), ncols=_num_columns(panel, series), frameon=False,
            labelcolor=TEXT, fontsize=7.5, handlelength=1, columnspacing=1.1, handletextpad=0.4, borderaxespad=0,
            labelspacing=0.25,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "No data", ha="center", va="center", color=FAINT, size=12, transform=axes.transAxes)


def _num_columns(panel: dict[str, Any], series: Sequence[Series]) -> int:
    """How many names stand beside each other in a panel's legend."""
    widest_px = max((len(line.name) for line in series), default=1) * 6 + 34
    return max(1, int((panel["gridPos"]["w"] * COLUMN_PX - 60) / widest_px))


def _limit(axes: Axes, defaults: dict[str, Any], stacked: float | None, series: Sequence[Series]) -> None:
    """The axis from the panel's minimum to its maximum, with round ticks. stacked: the height of stacked lines."""
    known = [value for line in series for value in line.values if math.isfinite(value)]
    limits = [step["value"] for step in defaults.get("thresholds", {}).get("steps", []) if step.get("value")]
    bottom, highest = defaults.get("min", min(known, default=0.0)), max(known, default=0.0)
    # A line of a limit far above is left out, as it would press all others to the ground.
    near = [limit for limit in limits if limit <= 4 * highest or not highest]
    top = stacked or defaults.get("max") or bottom + 1.1 * (max([highest, *near]) - bottom) or 1.0
    # A line at the bottom is to be seen in its whole width.
    axes.set_ylim(bottom - (top - bottom) / 60, top)
    size = next((size for size, _ in BYTES if defaults["unit"] == "bytes" and top >= size), 1)
    ticks = MaxNLocator(5).tick_values(bottom / size, top / size)
    axes.set_yticks([tick * size for tick in ticks if bottom <= tick * size <= top])


def _stack(axes: Axes, series: Sequence[Series], colors: Sequence[str]) -> None:
    moments = sorted({at for line in series for at in line.times})
    tables = [dict(zip(line.times, line.values, strict=True)) for line in series]
    heights = [[value if math.isfinite(value := table.get(at, 0.0)) else 0.0 for at in moments] for table in tables]
    below = [0.0] * len(moments)
    for line, color, height in zip(series, colors, heights, strict=True):
        above = [low + high for low, high in zip(below, height, strict=True)]
        axes.fill_between(moments, below, above, color=color, alpha=0.6, lw=0, label=line.name)  # type: ignore[arg-type]
        below = above
    axes.set_ylim(0, max(below, default=1.0) * 1.08 or 1)


def _colors(panel: dict[str, Any], series: Sequence[Series]) -> list[str]:
    """The color of each line: by the panel's overrides, else from the palette."""
    shades = [
        (override["matcher"]["options"].strip("/"), each["value"]["fixedColor"])
        for override in panel["fieldConfig"].get("overrides", [])
        for each in override["properties"]
        if each["id"] == "color"
    ]
    used: dict[str, int] = {}
    colors = []
    for place, line in enumerate(series):
        name = next((color for pattern, color in shades if re.search(pattern, line.name)), None)
        if name is None:
            colors.append(PALETTE[place % len(PALETTE)])
            continue
        colors.append(SHADES[name][used.get(name, 0) % len(SHADES[name])])
        used[name] = used.get(name, 0) + 1
    return colors


def _format(value: float, unit: str, decimals: int | None) -> str:
    """A value as Grafana writes it."""
    if unit == "percentunit":
        return f"{value * 100:.{decimals if decimals is not None else 3}{'f' if decimals is not None else 'g'}} %"
    if unit == "bytes":
        return next((f"{value / size:.3g} {name}" for size, name in BYTES if abs(value) >= size), f"{value:.3g} B")
    if unit == "s":
        return next(
            (
                f"{value / size:.3g} {name}s"
                for size, _, name in SMALL
                if 0 < abs(value) < 1000 * size and abs(value) < 1
            ),
            f"{value:.3g} s",
        )
    number = f"{value:.{decimals}f}" if decimals is not None else _short(value)
    suffix = (
        unit.removeprefix("suffix:")
        if unit.startswith("suffix:")
        else {"reqps": " req/s", "percent": " %"}.get(unit, "")
    )
    return number + suffix


def _short(value: float) -> str:
    return next((f"{value / size:.3g}{name}" for size, name in LARGE if abs(value) >= size), f"{value:.3g}")


if __name__ == "__main__":
    main()
