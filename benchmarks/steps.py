"""What capturing costs and what every captured step takes, for both variants of a shape.

    python -m benchmarks.steps --shape llama-3.1-8b

The steps are blank: they read no key that was cached before. A shape is tokens x requests, a decode step one number.
The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.shapes import SHAPES
from quant.scheme import PRESETS
from service.engine.device.runner import Runner
from service.engine.shapes import Shape
from service.models.config import ModelConfig
from service.models.random_weights import random_decoder

BLOCK_SIZE = 64
NUM_BLOCKS = 128


def main() -> None:
    args = _arguments()
    certificate = birth_certificate(args.commit)
    found = {variant: _measured(variant, args) for variant in args.variants.split(",")}
    rows: list[dict[str, Any]] = [row for row, _ in found.values()]
    times_s = {variant: times for variant, (_, times) in found.items()}
    for shape in next(iter(times_s.values())):
        row = {"what": "step", "tokens": shape.num_tokens, "requests": shape.num_requests, "is_decode": shape.is_decode}
        rows.append(row | {f"{variant}_ms": 1e3 * times[shape] for variant, times in times_s.items()})
    write(args.out or RESULTS / f"steps-{args.shape}.json", certificate, rows)
    print(_table(rows, list(times_s)))
    print(json.dumps(rows))


def _measured(variant: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[Shape, float]]:
    """Capture all steps of a variant: what that took, and what the steps take."""
    config = ModelConfig.of(SHAPES[args.shape], args.max_model_len)
    decoder = random_decoder(config, PRESETS[variant], torch.float16, torch.device("cuda"))
    runner = Runner(
        decoder,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_requests=args.max_num_requests,
        max_tokens=args.max_batched_tokens,
        has_drafts=False,
    )
    before_bytes, marks = torch.cuda.mem_get_info()[0], [time.perf_counter()]
    marks += [time.perf_counter() for _ in runner.warming()]
    num_shapes = len(runner.step_times_s)
    # The compiler runs in the pieces before the captures; the times are measured after the last.
    row = {
        "what": "capture",
        "variant": variant,
        "shapes": num_shapes,
        "compile_s": marks[-2 * num_shapes - 1] - marks[0],
        "capture_s": marks[-num_shapes - 1] - marks[-2 * num_shapes - 1],
        "bytes": before_bytes - torch.cuda.mem_get_info()[0],
    }
    times_s = dict(runner.step_times_s)
    runner.close()
    del runner, decoder
    torch.cuda.empty_cache()
    print(row, file=sys.stderr, flush=True)
    return row, times_s


def _table(rows: list[dict[str, Any]], variants: list[str]) -> str:
    lines = []
    for row in rows:
        if row["what"] == "capture":
            lines.append(
                f"{row['variant']}: {row['shapes']} shapes, compiled in {row['compile_s']:.1f} s, captured in "
                f"{row['capture_s']:.1f} s, {row['bytes'] / 2**20:.0f} MiB"
            )
            continue
        shape = str(row["tokens"]) if row["is_decode"] else f"{row['tokens']}x{row['requests']}"
        times = [row[f"{variant}_ms"] for variant in variants]
        words = "".join(f"{time_ms:>10.2f}" for time_ms in times)
        lines.append(f"{shape:<12}{words}" + (f"{times[1] / times[0]:>8.2f}" if len(times) == 2 else ""))
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--variants", default="w8a8,fp16")
    parser.add_argument("--max-num-requests", type=int, default=256)
    parser.add_argument("--max-batched-tokens", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    return parser.parse_args()


if __name__ == "__main__":
    main()
