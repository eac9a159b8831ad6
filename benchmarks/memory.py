"""The peak memory of quantizing a 7B-shaped model, beside the floats of its largest layer.

    python -m benchmarks.memory [--layers 32] [--scheme w8a8] [--alpha 0.5] [--folder FOLDER]

The model is random (a Llama of hidden size 4096 and 32,000 tokens in bfloat16, sharded by layer): memory depends on
shapes alone. 32 layers take 20 GB of disk with what is made of them. The peak after every layer is part of the result,
so that growth from layer to layer shows. A search takes hours on a CPU; with --alpha there is none.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.report import RESULTS, birth_certificate, write
from quant.convert.decoder_layers import skeleton
from quant.convert.layer import Recipe
from quant.convert.model import quantize_checkpoint
from quant.scheme import PRESETS, Scheme
from service.models.config import ModelConfig, down_names, linear_names, smooth_groups

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--alpha", type=float, help="by hand, instead of the search")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens, in windows of 512")
    parser.add_argument("--folder", type=Path, default=None, help="where the model is made; default: a temporary one")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; default: benchmarks/results/")
    args = parser.parse_args()
    scheme = PRESETS[args.scheme].with_alpha(args.alpha)
    peaks: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source = Path(scratch) / "float"
        write_model(source, args.layers)
        before = peak_bytes()
        began = time.monotonic()
        layer_bytes = quantize(source, Path(scratch) / "int8", scheme, args.tokens, peaks)
        peak = peak_bytes()
    row = {
        "scheme": scheme.label,
        "num_layers": args.layers,
        "calibration_tokens": args.tokens,
        "seconds": round(time.monotonic() - began),
        "layer_float32_bytes": layer_bytes,
        "before_bytes": before,
        "peak_bytes": peak,
        "peak_above_layer_gib": round((peak - layer_bytes) / 2**30, 2),
        "peak_gib_after_layer": peaks,
    }
    write(args.out or RESULTS / f"memory-7b-{args.layers}-layers.json", birth_certificate(), [row])
    print(json.dumps(row))


def write_model(folder: Path, num_layers: int) -> None:
    """A random model, one file per layer and one for the rest, written layer by layer."""
    fields: dict[str, Any] = {**SHAPE, "num_hidden_layers": num_layers, "dtype": "bfloat16"}
    LlamaConfig(**fields).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in skeleton(folder).named_parameters():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    for file, shapes in files.items():
        tensors = {}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
            tensors[name] = noise.abs() if len(shape) == 1 else noise.mul_(shape[-1] ** -0.5)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def quantize(source: Path, out: Path, scheme: Scheme, num_tokens: int, peaks: list[float]) -> int:
    """Run the scheme and note the peak, GiB, after each layer; bytes of one layer's floats in float32."""
    config = ModelConfig.load(source)
    names = linear_names(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPE["vocab_size"], (max(1, num_tokens // 512), 512), generator=generator)

    def note(done: int, total: int, detail: str) -> None:
        peaks.append(round(peak_bytes() / 2**30, 2))
        print(f"{done} of {total}, {detail}, peak {peaks[-1]} GiB", file=sys.stderr, flush=True)

    quantize_checkpoint(
        source,
        out,
        Recipe(
            scheme=scheme,
            linear_names=tuple(names),
            down_names=down_names(config),
            groups=tuple(smooth_groups(config)),
            dtype=config.dtype,
            windows=tokens if scheme.needs_calibration else None,
        ),
        on_progress=note,
    )
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    return 4 * (4 * hidden * hidden + 3 * hidden * inner)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
