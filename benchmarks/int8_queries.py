"""What rounded queries over an int8 cache cost: w8a8 with a float cache, with int8 keys alone, and as it is served.

    python -m benchmarks.int8_queries

The demo model on the texts of `benchmarks.held_out`, each window one prompt. KL is to the float model; beside it is
printed how much of it the rounded queries add.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.held_out import TEXTS, fetched
from benchmarks.quality import WINDOW_LEN
from benchmarks.report import RESULTS, birth_certificate, write
from kernels.reference import attention
from quant.analysis.perplexity import evaluate
from quant.scheme import PRESETS
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.devices import pick_device, pick_dtype
from service.models.loader import load_decoder
from service.settings import load_settings
from service.store.calibration import Calibration, text_windows
from service.store.quantized import quantized_folder
from service.store.resolve import resolve_model
from service.tools.evaluate.quality import scorer

FLOAT_CACHE, FLOAT_QUERIES, ROUNDED = "float cache", "int8 cache, float queries", "int8 cache, int8 queries"


def float_queries() -> AbstractContextManager[object]:
    """Attention over int8 keys without rounded queries, on the CPU."""
    return patch.object(attention, "as_multiplied", lambda q, _: q)


def logits_in(decoder: Decoder, context: Callable[[], AbstractContextManager[object]]) -> Callable[[Tensor], Tensor]:
    """`scorer` of a decoder inside a context."""
    score = scorer(decoder)

    def logits_of(token_ids: Tensor) -> Tensor:
        with context():
            return score(token_ids)

    return logits_of


def rows_of(num_windows: int) -> Iterator[dict[str, Any]]:
    settings = load_settings(device="cpu")
    source, device = resolve_model(None, settings.cache_dir), pick_device("cpu")
    dtype = pick_dtype(settings.dtype, ModelConfig.load(source), device)
    folder = quantized_folder(source, PRESETS["w8a8"], Calibration(), settings.cache_dir, device)
    baseline = load_decoder(source, dtype, device)
    plain, int8 = (load_decoder(folder, dtype, device, kv=kv) for kv in ("float", "int8"))
    candidates = {
        FLOAT_CACHE: logits_in(plain, nullcontext),
        FLOAT_QUERIES: logits_in(int8, float_queries),
        ROUNDED: logits_in(int8, nullcontext),
    }
    for name, (member, sha256) in TEXTS.items():
        windows = text_windows(source, fetched(settings, member, sha256), num_windows, WINDOW_LEN)
        wanted, *found = evaluate(("fp16", scorer(baseline)), candidates, windows)
        kl = {row.scheme: row.kl for row in found}
        print(f"{name}: {kl}, queries add {kl[ROUNDED] / kl[FLOAT_QUERIES] - 1:+.2%}", flush=True)
        yield from ({"text": name, **asdict(row), "ratio": row.perplexity / wanted.perplexity} for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", type=Path, default=RESULTS / "int8-queries-demo-cpu.json")
    args = parser.parse_args()
    write(args.out, birth_certificate(args.commit), list(rows_of(args.windows)))


if __name__ == "__main__":
    main()
