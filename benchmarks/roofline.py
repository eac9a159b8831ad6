"""Draws what `ottava roofline --json FILE` wrote as a PNG beside it.

    ottava roofline llama-3.1-8b --gpu h100 --json roofline.json
    python -m benchmarks.roofline roofline.json

The roofs of the GPU in FP16 and INT8, every Linear and the whole step under each dataflow at the height that is
predicted, and where times were measured, hollow, at the height that was reached.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

from matplotlib import pyplot
from matplotlib.axes import Axes

from quant.analysis.roofline import FLOWS

COLOURS = {"fp16": "tab:grey", "int8": "tab:orange", "dataflow": "tab:blue"}
MARKERS = {"qkv": "o", "o": "s", "gate_up": "^", "down": "v", "step": "*"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON file that `ottava roofline --json` wrote")
    parser.add_argument("--out", type=Path, help="PNG file; default: the result's name with .png")
    args = parser.parse_args()
    out = args.out or args.result.with_suffix(".png")
    draw(json.loads(args.result.read_text(encoding="utf-8")), out)
    print(f"wrote {out}")


def draw(result: dict[str, Any], out: Path) -> None:
    """Draw one report into a PNG file."""
    gpu = result["gpu"]
    rows = [row for row in result["rows"] if row["part"] in MARKERS]
    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    _roofs(axes, gpu, [row["intensity"] for row in rows])
    for row in rows:
        place: dict[str, Any] = {
            "marker": MARKERS[row["part"]],
            "color": COLOURS[row["flow"]],
            "markersize": 7,
            "linestyle": "",
        }
        axes.plot(row["intensity"], _tops(row, "us"), **place)
        if "measured_us" in row:
            axes.plot(row["intensity"], _tops(row, "measured_us"), **place, fillstyle="none")
        if row["part"] == "step" and row["flow"] == "dataflow":
            place_of_text = row["intensity"], _tops(row, "us")
            axes.annotate(f"T = {row['tokens']}", place_of_text, (8, -10), textcoords="offset points", fontsize=8)
    for flow, label in FLOWS.items():
        axes.plot([], [], "o", color=COLOURS[flow], label=label)
    for part in dict.fromkeys(row["part"] for row in rows):
        axes.plot([], [], MARKERS[part], color="black", label=part)
    if any("measured_us" in row for row in rows):
        axes.plot([], [], "o", color="black", fillstyle="none", label="measured")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TOPS")
    axes.set_title(f"{result['model']['name']} on {gpu['name']}, {gpu['bytes_per_s'] / 1e12:g} TB/s", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _roofs(axes: Axes, gpu: dict[str, Any], intensities: list[float]) -> None:
    """Bandwidth up to the ridge of each type, its peak from there on."""
    low, high = min(intensities) / 2, max(intensities) * 2
    for flow, key in (("fp16", "fp16_per_s"), ("dataflow", "int8_per_s")):
        ridge = gpu[key] / gpu["bytes_per_s"]
        ends = [low, ridge, max(high, 2 * ridge)]
        heights = [min(gpu[key], gpu["bytes_per_s"] * end) / 1e12 for end in ends]
        axes.plot(ends, heights, color=COLOURS[flow], linewidth=1.2)
        axes.annotate(f"{heights[1]:.0f} TOPS, ridge {ridge:.0f}", (ridge, heights[1]), fontsize=8, ha="right")


def _tops(row: dict[str, Any], name: str) -> float:
    tops: float = row["operations"] / row[name] / 1e6
    return tops


if __name__ == "__main__":
    main()
