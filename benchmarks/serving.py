"""Decode and prefill speed of both variants through the engine, in one run.

    python -m benchmarks.serving                                     the demo model, or
    python -m benchmarks.serving --shape llama-3.1-8b --batches 1,8,32,64,128,256 --prompt 512
    python -m benchmarks.serving --shape llama-3.1-70b --tensor-parallel 2 --variants w8a8 --batches 1,32,128

Both variants are loaded, and take turns in every round, so that a machine whose speed drifts does not favour one. A
step is timed as the engine turns it: plan, launch, read the tokens, commit; on a GPU the next step is launched before
the last is read. HTTP is left out. Prompts are random token ids. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, birth_certificate, quantiles, write
from benchmarks.shapes import SHAPES
from quant.scheme import PRESETS
from service.engine.api import SamplingParams
from service.engine.device.runner import Runner
from service.engine.request import Request
from service.engine.scheduler import Scheduler
from service.host.memory import cache_budget
from service.host.ranks.group import RankGroup, layout_of
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.devices import pick_device, pick_dtype
from service.models.loader import load_decoder
from service.models.random_weights import random_decoder
from service.models.sharding import ALONE
from service.process import keep_freed_memory
from service.settings import Settings, load_settings
from service.store.calibration import Calibration
from service.store.quantized import quantized_folder
from service.store.resolve import resolve_model
from service.tools.evaluate.speed import drive


def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    if pick_device("auto").type == "cpu":
        # As the engine process does.
        keep_freed_memory()
    certificate = birth_certificate(args.commit)
    variants = args.variants.split(",")
    with tempfile.TemporaryDirectory() as folder:
        group = _group(args, Path(folder)) if args.tensor_parallel > 1 else None
        try:
            certificate["tensor parallel"] = args.tensor_parallel
            _measure(variants, args, certificate, group, Path(folder))
        finally:
            if group is not None:
                group.close()


def _measure(
    variants: list[str], args: argparse.Namespace, certificate: dict[str, Any], group: RankGroup | None, folder: Path
) -> None:
    decoders = {variant: _decoder(variant, args, group, folder) for variant in variants}
    benches = {
        variant: Bench(variant, decoder, args, len(variants) - index, group)
        for index, (variant, decoder) in enumerate(decoders.items())
    }
    for variant, decoder in decoders.items():
        certificate[f"{variant} dtype"] = str(decoder.dtype).removeprefix("torch.")
        certificate[f"{variant} kv cache"] = str(decoder.kv_dtype).removeprefix("torch.")
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        rows += _decode(benches, batch, args)
    for prompt_len in args.prefill:
        rows += _rates(benches, "prefill", args.prefill_prompts, prompt_len, 1, args.rounds)
    if args.burst:
        rows += _rates(benches, "burst", args.burst, args.prompt, args.burst_tokens, 1)
    _add_ratios(rows)
    name = args.out or RESULTS / f"serving-{args.shape or 'demo'}-{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    write(Path(name), certificate, rows)
    _print_table(certificate, rows)
    print(json.dumps(rows))


def _decode(benches: dict[str, Bench], batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Inter-token latency of full decode steps of one batch size; the variants take turns, round by round."""
    times: dict[str, list[float]] = {variant: [] for variant in benches}
    for _ in range(args.rounds):
        for variant, bench in benches.items():
            times[variant] += bench.decode_times(batch, args.prompt, args.steps)
    rows = []
    for variant, measured in times.items():
        row = {"what": "decode", "variant": variant, "batch": batch, "prompt": args.prompt, "steps": len(measured)}
        row |= {f"itl_ms_{name}": 1e3 * value for name, value in quantiles(measured).items()}
        rows.append(row | {"tokens_per_s": batch / quantiles(measured)["p50"]})
        _print_row(rows[-1])
    return rows


def _rates(
    benches: dict[str, Bench], what: str, count: int, prompt_len: int, max_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Tokens per second of requests that arrive at once: of their prompts, or of their answers for a burst."""
    rates: dict[str, list[float]] = {variant: [] for variant in benches}
    counted = count * (prompt_len if what == "prefill" else max_tokens)
    for _ in range(rounds):
        for variant, bench in benches.items():
            rates[variant].append(counted / bench.total_s(count, prompt_len, max_tokens))
    rows = []
    for variant, measured in rates.items():
        row = {"what": what, "variant": variant, "batch": count, "prompt": prompt_len, "max_tokens": max_tokens}
        row |= {f"tokens_per_s_{name}": value for name, value in quantiles(measured).items()}
        rows.append(row | {"tokens_per_s": quantiles(measured)["p50"]})
        _print_row(rows[-1])
    return rows


class Bench:
    """One variant behind a scheduler and a runner, driven without HTTP."""

    def __init__(
        self, variant: str, decoder: Decoder, args: argparse.Namespace, num_sharing: int, group: RankGroup | None
    ) -> None:
        self.vocab_size = decoder.config.vocab_size
        self.max_batched_tokens = args.max_batched_tokens
        self.rows = _rows(args)
        block_size = Settings().block_size
        block_bytes = block_size * decoder.kv_bytes_per_token
        device = decoder.embedding.device
        num_free = None if group is None else min(each[1] for each in group.measured(device, {}))
        num_blocks = cache_budget(device, num_sharing, num_free=num_free) // block_bytes
        if group is not None:
            group.start(variant, num_blocks)
        self.runner = Runner(
            decoder,
            num_blocks=num_blocks,
            block_size=block_size,
            max_requests=self.rows,
            max_tokens=args.max_batched_tokens,
            use_graphs=not args.no_graphs,
            lead=None if group is None else group.lead(variant),
            has_drafts=False,
        )
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_requests=self.rows,
            max_batched_tokens=args.max_batched_tokens,
            # Every round reads the same prompts.
            has_prefix_cache=False,
        )
        started = time.perf_counter()
        self.runner.warm_up()
        print(f"{variant}: warmed up in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    def decode_times(self, batch: int, prompt_len: int, steps: int) -> list[float]:
        """Seconds of each full decode step, the first few left out."""
        self._add(batch, prompt_len, steps + 8)
        return [
            step_s
            for step, step_s in drive(self.scheduler, self.runner)
            if step.is_decode and len(step.chunks) == batch
        ][4:]

    def total_s(self, count: int, prompt_len: int, max_tokens: int) -> float:
        """Seconds until the last of count requests is done."""
        self._add(count, prompt_len, max_tokens)
        started = time.perf_counter()
        for _ in drive(self.scheduler, self.runner):
            pass
        return time.perf_counter() - started

    def _add(self, count: int, prompt_len: int, max_tokens: int) -> None:
        rng = random.Random(0)
        for i in range(count):
            prompt = [rng.randrange(self.vocab_size) for _ in range(prompt_len)]
            self.scheduler.add(Request(str(i), prompt, SamplingParams(max_tokens, ignore_eos=True), 0.0, i))


def _rows(args: argparse.Namespace) -> int:
    largest: int = max(*args.batches, 64)
    return largest


def _max_model_len(args: argparse.Namespace) -> int:
    longest: int = max(args.prompt + max(args.steps, args.burst_tokens) + 16, max(args.prefill) + 16)
    return longest


def _group(args: argparse.Namespace, folder: Path) -> RankGroup:
    """The other ranks, which make the same random weights from the shape's config.json."""
    if not args.shape:
        raise SystemExit("--tensor-parallel goes with --shape: the ranks make random weights of it")
    SHAPES[args.shape].save_pretrained(folder)
    settings = load_settings(
        model=str(folder),
        random_weights=True,
        tensor_parallel=args.tensor_parallel,
        scheme=args.scheme,
        kv_cache=args.kv_cache,
        dtype=args.dtype,
        max_model_len=_max_model_len(args),
        max_num_requests=_rows(args),
        max_batched_tokens=args.max_batched_tokens,
        cuda_graphs=not args.no_graphs,
    )
    device = pick_device("auto")
    return RankGroup(settings, layout_of(settings, ModelConfig.load(folder, settings.max_model_len), device), device)


def _decoder(variant: str, args: argparse.Namespace, group: RankGroup | None, shape_folder: Path) -> Decoder:
    """shape_folder: holds the shape's config.json for the other ranks."""
    device = pick_device("auto")
    max_model_len = _max_model_len(args)
    scheme = PRESETS["fp16" if variant == "fp16" else args.scheme].with_kv(args.kv_cache)
    if args.shape:
        config = ModelConfig.of(SHAPES[args.shape], max_model_len)
        ranks = ALONE if group is None else group.ranks
        if group is not None:
            group.load(variant, shape_folder, scheme.kv)
        dtype = pick_dtype(args.dtype, config, device)
        decoder = random_decoder(config, scheme, dtype, device, ranks=ranks)
        # As the other ranks do.
        ranks.reserve(args.max_batched_tokens, config.hidden_size, dtype)
        return decoder
    cache = Settings().cache_dir
    folder = resolve_model(args.model, cache)
    dtype = pick_dtype(args.dtype, ModelConfig.load(folder), device)
    if scheme.is_int8:
        folder = quantized_folder(folder, scheme, Calibration(), cache, device)
    return load_decoder(folder, dtype, device, max_model_len, scheme.kv)


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """fp16's time over this variant's, wherever the same run measured both."""
    what = ("what", "batch", "prompt")
    baseline = {tuple(row[key] for key in what): row["tokens_per_s"] for row in rows if row["variant"] == "fp16"}
    for row in rows:
        if (same := tuple(row[key] for key in what)) in baseline:
            row["speedup"] = row["tokens_per_s"] / baseline[same]


def _print_row(row: dict[str, Any]) -> None:
    print({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()}, file=sys.stderr, flush=True)


def _print_table(certificate: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    print(f"{certificate['device']}, torch {certificate['torch']}, commit {certificate['commit']}")
    print(f"{'what':<9}{'batch':>6}{'prompt':>8}{'variant':>9}{'itl ms p50':>12}{'tokens/s':>11}{'vs fp16':>9}")
    for row in sorted(rows, key=lambda row: (row["what"], row["batch"], row["variant"])):
        itl = f"{row['itl_ms_p50']:.2f}" if "itl_ms_p50" in row else ""
        ratio = f"{row['speedup']:.2f}" if "speedup" in row else ""
        print(
            f"{row['what']:<9}{row['batch']:>6}{row['prompt']:>8}{row['variant']:>9}{itl:>12}"
            f"{row['tokens_per_s']:>11.1f}{ratio:>9}"
        )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or id; default: the demo model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of these shapes instead of a model")
    parser.add_argument("--variants", default="fp16,w8a8")
    parser.add_argument("--scheme", default="w8a8", help="preset of the w8a8 variant")
    parser.add_argument("--kv-cache", choices=["float", "int8"], default="float", help="of the w8a8 variant")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens of a decode run")
    parser.add_argument("--steps", type=int, default=48, help="decode steps measured")
    parser.add_argument("--prefill", type=_numbers, default=[512], help="prompt tokens of prefill runs")
    parser.add_argument("--prefill-prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="turns that each variant takes")
    parser.add_argument("--burst", type=int, default=0, help="requests that arrive at once; 0 for none")
    parser.add_argument("--burst-tokens", type=int, default=128)
    parser.add_argument("--max-batched-tokens", type=int, default=512)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share the model")
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", help="JSON file; default: benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
