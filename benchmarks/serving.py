"""Decode and prefill speed of both variants through the engine, in one run.

    python -m benchmarks.serving                                     the demo model, or
    python -m benchmarks.serving --shape llama-3.1-8b --batches 1,8,32,64,128,256 --prompt 512

Each variant is loaded, measured and dropped in turn. A step is timed as the engine turns it: plan, launch, read the
tokens, commit; on a GPU the next step is launched before the last is read. HTTP is left out. Prompts are random token
ids. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, birth_certificate, quantiles, write
from benchmarks.shapes import SHAPES
from quant.scheme import PRESETS
from service.engine.request import Request, SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler, Step
from service.hosting import cache_budget
from service.models.decoder import Decoder, cache_dtype
from service.models.families import ModelConfig
from service.models.loader import load_decoder, pick_device, pick_dtype, random_decoder
from service.models.prepare import Calibration, quantized_folder, resolve_model
from service.settings import Settings


def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    certificate = birth_certificate(args.commit)
    rows: list[dict[str, Any]] = []
    for variant in args.variants.split(","):
        decoder = _decoder(variant, args)
        bench = Bench(variant, decoder, args)
        certificate[f"{variant} dtype"] = str(decoder.dtype).removeprefix("torch.")
        for batch in args.batches:
            rows.append(bench.decode(batch, args.prompt, args.steps))
            _print_row(rows[-1])
        rows.append(bench.prefill(args.prefill, args.prefill_prompts))
        _print_row(rows[-1])
        if args.burst:
            rows.append(bench.burst(args.burst, args.prompt, args.burst_tokens))
            _print_row(rows[-1])
        del bench, decoder
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    _add_ratios(rows)
    name = args.out or RESULTS / f"serving-{args.shape or 'demo'}-{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    write(Path(name), certificate, rows)
    _print_table(certificate, rows)
    print(json.dumps(rows))


class Bench:
    """One variant behind a scheduler and a runner, driven without HTTP."""

    def __init__(self, variant: str, decoder: Decoder, args: argparse.Namespace) -> None:
        self.variant = variant
        self.vocab_size = decoder.config.vocab_size
        self.max_batched_tokens = args.max_batched_tokens
        self.rows = max(*args.batches, 64)
        block_size = 16
        block_bytes = block_size * decoder.config.cache_elements_per_token * cache_dtype(decoder).itemsize
        num_blocks = cache_budget(decoder.embedding.device, 1) // block_bytes
        limits = num_blocks, block_size, self.rows, args.max_batched_tokens
        self.runner = Runner(decoder, *limits, use_graphs=not args.no_graphs)
        self.scheduler = Scheduler(*limits)
        started = time.perf_counter()
        self.runner.warm_up()
        print(f"{variant}: warmed up in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    def decode(self, batch: int, prompt_len: int, steps: int) -> dict[str, Any]:
        """Inter-token latency of full decode steps of one batch size."""
        self._add(batch, prompt_len, steps + 8)
        times = [step_s for step, step_s in self._drive() if step.is_decode and len(step.chunks) == batch]
        times = times[4:]
        row = {"what": "decode", "batch": batch, "prompt": prompt_len, "steps": len(times)}
        row |= {f"itl_ms_{name}": 1e3 * value for name, value in quantiles(times).items()}
        return row | {"variant": self.variant, "tokens_per_s": batch / quantiles(times)["p50"]}

    def prefill(self, prompt_len: int, num_prompts: int) -> dict[str, Any]:
        """Prompt tokens per second, several prompts at once."""
        rates = []
        for _ in range(4):
            self._add(num_prompts, prompt_len, 1)
            started = time.perf_counter()
            for _ in self._drive():
                pass
            rates.append(num_prompts * prompt_len / (time.perf_counter() - started))
        row = {"variant": self.variant, "what": "prefill", "batch": num_prompts, "prompt": prompt_len}
        return (
            row
            | {f"tokens_per_s_{name}": value for name, value in quantiles(rates[1:]).items()}
            | {"tokens_per_s": quantiles(rates[1:])["p50"]}
        )

    def burst(self, num_requests: int, prompt_len: int, max_tokens: int) -> dict[str, Any]:
        """Output tokens per second of many requests that arrive at once."""
        self._add(num_requests, prompt_len, max_tokens)
        started = time.perf_counter()
        for _ in self._drive():
            pass
        rate = num_requests * max_tokens / (time.perf_counter() - started)
        return {
            "variant": self.variant,
            "what": "burst",
            "batch": num_requests,
            "prompt": prompt_len,
            "max_tokens": max_tokens,
            "tokens_per_s": rate,
        }

    def _add(self, count: int, prompt_len: int, max_tokens: int) -> None:
        rng = random.Random(0)
        for i in range(count):
            prompt = [rng.randrange(self.vocab_size) for _ in range(prompt_len)]
            self.scheduler.add(Request(str(i), prompt, SamplingParams(max_tokens, ignore_eos=True), 0.0, i))

    def _drive(self) -> Iterator[tuple[Step, float]]:
        """Turn steps as the engine does until all is done: each step with the time since the one before it."""
        in_flight = None
        last = time.perf_counter()
        while not self.scheduler.is_idle or in_flight:
            step = self.scheduler.schedule(last)
            launched = None if step is None else (step, self.runner.execute(step))
            settled = in_flight if self.runner.is_async else launched
            in_flight = launched if self.runner.is_async else None
            if settled is not None:
                self.scheduler.commit(settled[0], settled[1].read())
                now = time.perf_counter()
                yield settled[0], now - last
                last = now
        self.scheduler.check_integrity()


def _decoder(variant: str, args: argparse.Namespace) -> Decoder:
    device = pick_device("auto")
    max_model_len = max(args.prompt + max(args.steps, args.burst_tokens) + 16, args.prefill + 16)
    scheme = PRESETS["fp16" if variant == "fp16" else args.scheme]
    if args.shape:
        config = ModelConfig.of(SHAPES[args.shape], max_model_len)
        return random_decoder(config, scheme, pick_dtype(args.dtype, config, device), device)
    cache = Settings().cache_dir
    folder = resolve_model(args.model, cache)
    dtype = pick_dtype(args.dtype, ModelConfig.load(folder), device)
    if scheme.is_int8:
        folder = quantized_folder(folder, scheme, Calibration(), cache, device)
    return load_decoder(folder, dtype, device, max_model_len)


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """fp16's time over this variant's, wherever the same run measured both."""
    baseline = {(row["what"], row["batch"]): row["tokens_per_s"] for row in rows if row["variant"] == "fp16"}
    for row in rows:
        if (row["what"], row["batch"]) in baseline:
            row["speedup"] = row["tokens_per_s"] / baseline[row["what"], row["batch"]]


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or id; default: the demo model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of these shapes instead of a model")
    parser.add_argument("--variants", default="fp16,w8a8")
    parser.add_argument("--scheme", default="w8a8", help="preset of the w8a8 variant")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens of a decode run")
    parser.add_argument("--steps", type=int, default=48, help="decode steps measured")
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens of a prefill run")
    parser.add_argument("--prefill-prompts", type=int, default=4)
    parser.add_argument("--burst", type=int, default=0, help="requests that arrive at once; 0 for none")
    parser.add_argument("--burst-tokens", type=int, default=128)
    parser.add_argument("--max-batched-tokens", type=int, default=512)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", help="JSON file; default: benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
