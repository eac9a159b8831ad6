"""Draws results of `benchmarks.traffic`: what clients wait for at each rate of requests, by server.

    python -m benchmarks.traffic_plot benchmarks/results/traffic-llama-3.1-8b-h200.json [more results] --out FILE.png

Two panels: time to the first token, p50 as a line and p99 as a thin one, and time per token, p50. A result of
`--float` is drawn dashed. The rates of a saturation are points too; one that missed the SLOs is an empty circle.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.traffic import SLOS, read_point

Row = dict[str, Any]

COLOURS = {"ottava": "tab:blue"}
OTHER = "tab:orange"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that benchmarks.traffic wrote")
    parser.add_argument("--out", type=Path, help="PNG file; default: the first result's name with .png")
    args = parser.parse_args()
    out = args.out or args.results[0].with_suffix(".png")
    draw([json.loads(path.read_text(encoding="utf-8")) for path in args.results], out)
    print(f"wrote {out}")


def draw(results: Sequence[dict[str, Any]], out: Path) -> None:
    figure, (first, each) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for result in results:
        is_float = "--float" in result["run"]["command"]
        for server in dict.fromkeys(row["server"] for row in result["rows"]):
            points = by_rate(row for row in result["rows"] if row["server"] == server)
            name = f"{server}, {'float16' if is_float else 'W8A8'}"
            style: dict[str, Any] = {"color": COLOURS.get(server, OTHER), "linestyle": "--" if is_float else "-"}
            _line(first, points, "median_ttft_ms", label=name, **style)
            _line(first, points, "p99_ttft_ms", linewidth=0.7, alpha=0.6, has_marks=False, **style)
            _line(each, points, "median_tpot_ms", label=name, **style)
    limits = dict(slo.split(":") for slo in SLOS)
    for axes, title, limit in ((first, "first token, p50 (thin: p99)", "ttft"), (each, "per token, p50", "tpot")):
        axes.axhline(float(limits[limit]), color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="requests/s", ylabel="ms", xlim=(0, None), ylim=(0, 1.3 * float(limits[limit])))
        axes.grid(visible=True, alpha=0.3)
    first.legend(loc="upper left")
    figure.suptitle(f"{results[0]['run']['device']}: Llama-3.1-8B shapes, 512 tokens in, 128 out; dotted: the SLOs")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def by_rate(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a rate, of `rate` points and saturations, in its order."""
    found = []
    for row in rows:
        kind, *numbers = read_point(row["point"])
        if kind in {"saturation", "rate"}:
            found.append({"rate": numbers[0], "is_served": True} | row)
    return sorted(found, key=lambda row: row["rate"])


def _line(axes: Axes, points: Sequence[Row], key: str, has_marks: bool = True, **style: Any) -> None:
    axes.plot([row["rate"] for row in points], [row[key] for row in points], **style)
    if has_marks:
        colour = style["color"]
        for row in points:
            axes.plot(row["rate"], row[key], "o", color=colour, fillstyle="full" if row["is_served"] else "none", ms=4)


if __name__ == "__main__":
    main()
