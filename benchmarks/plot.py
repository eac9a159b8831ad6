"""Draws a result of `benchmarks.kernels` as a PNG beside it.

    python -m benchmarks.plot benchmarks/results/kernels-h100.json

Four panels of one model's Linears and chain: fp16's time over int8's, the share of the roof, operations per second, and
the whole decoder layer. Apart from `benchmarks.kernels`, since a machine with a GPU need not have matplotlib.
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

from benchmarks.chain import INT8_KV
from benchmarks.goals import GOAL_SHAPE, cutlass

Row = dict[str, Any]

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON file that benchmarks.kernels wrote")
    parser.add_argument("--shape", help="model; default: the first in the result")
    parser.add_argument("--out", type=Path, help="PNG file; default: the result's name with .png")
    args = parser.parse_args()
    out = args.out or args.result.with_suffix(".png")
    draw(json.loads(args.result.read_text(encoding="utf-8")), out, args.shape)
    print(f"wrote {out}")


def draw(result: dict[str, Any], out: Path, shape: str | None = None) -> None:
    """Draw one run into a PNG file. shape: the model shown; None for the first of the run."""
    run = result["run"]
    timed = [row for row in result["rows"] if "us_p50" in row]
    linears = [row for row in timed if row["what"] == "linear"]
    shape = shape or next((row["shape"] for row in linears), None)
    linears = [row for row in linears if row["shape"] == shape]
    layers = list(dict.fromkeys(row["layer"] for row in linears))
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    (speedup, roof), (rate, chain) = axes
    for layer, colour in zip(layers, COLOURS, strict=False):
        ours, fp16 = (_of(linears, layer, variant) for variant in ("w8a8", "fp16"))
        _line(speedup, ours, "speedup", colour, layer)
        _line(roof, ours, "roof_share", colour, layer)
        _line(rate, ours, "tops", colour, f"{layer}, int8")
        _line(rate, fp16, "tops", colour, f"{layer}, fp16", "--")
        if shape == GOAL_SHAPE:
            _line(
                speedup, _cutlass_rows(layer, run["device"]), "speedup", colour, f"{layer}, CUTLASS + quantization", ":"
            )
    _finish(speedup, "time of fp16 / time of int8 (dotted: vLLM's CUTLASS + quantization, another run)")
    speedup.axhline(1.0, color="grey", linewidth=0.8)
    _finish(roof, "share of the roof, int8: bytes at copy rate or operations at the data sheet's peak")
    _finish(rate, "TOPS (dashed: fp16, TFLOP/s)")
    _bars(chain, [row for row in timed if row["what"] == "chain" and row["shape"] == shape])
    figure.suptitle(
        f"{shape}, {run['device']}, torch {run['torch']}, Triton {run['triton']}, commit {run['commit']}; "
        f"copy {run['copy_gb_per_s']:.0f} GB/s; medians, {run['timed by']}",
        fontsize=10,
    )
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _of(rows: list[Row], layer: str, variant: str) -> list[Row]:
    return sorted((r for r in rows if r["layer"] == layer and r["variant"] == variant), key=lambda r: int(r["tokens"]))


def _cutlass_rows(layer: str, device: str) -> list[Row]:
    return [
        {"tokens": tokens, "speedup": row["fp16_us"] / (row["gemm_us"] + row["quant_us"])}
        for (name, tokens), row in cutlass(device).items()
        if name == layer
    ]


def _line(axes: Axes, rows: list[Row], name: str, colour: str, label: str, style: str = "-") -> None:
    known = [row for row in rows if name in row]
    if known:
        axes.plot(
            [row["tokens"] for row in known],
            [row[name] for row in known],
            style,
            color=colour,
            label=label,
            marker="." if style == "-" else "",
            linewidth=1.6 if style == "-" else 1.0,
        )


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("tokens")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(fontsize=7)


def _bars(axes: Axes, rows: list[Row]) -> None:
    """The decoder layer: time of each variant as a share of fp16's, the microseconds above."""
    times = {(row["op"], row["tokens"], row["variant"]): row["us_p50"] for row in rows}
    steps = [(op, tokens) for op, tokens, variant in times if variant == "fp16"]
    colours = {"fp16": "tab:grey", "w8a8": "tab:blue", INT8_KV: "tab:cyan"}
    for offset, (variant, colour) in zip((-0.27, 0.0, 0.27), colours.items(), strict=True):
        there = [(i, step) for i, step in enumerate(steps) if (*step, variant) in times]
        shares = [times[*step, variant] / times[*step, "fp16"] for _, step in there]
        bars = axes.bar([i + offset for i, _ in there], shares, 0.27, label=variant, color=colour)
        axes.bar_label(bars, [f"{times[*step, variant]:.0f}" for _, step in there], fontsize=7)
    axes.set_xticks(range(len(steps)), [f"{op} {tokens}" for op, tokens in steps])
    axes.set_title("one decoder layer as a chain: time as a share of fp16's, and microseconds", fontsize=9)
    axes.grid(alpha=0.3, axis="y")
    if steps:
        axes.legend(fontsize=8, loc="lower right")


if __name__ == "__main__":
    main()
