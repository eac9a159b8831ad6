"""Speed of every kernel alone and of a whole decoder layer as a chain, on this GPU, beside what others reach.

    python -m benchmarks.kernels                                           everything, for four models' shapes, or
    python -m benchmarks.kernels --shapes llama-3.1-8b --only linear --tokens 1,16,4096
    python -m benchmarks.plot benchmarks/results/kernels-h100.json         draws a result

Times are CUDA graphs over weights that miss the L2 cache, on random data; contenders take turns. A kernel is timed only
after its result agreed with the exact one in the same run: where it does not, the row says `wrong` and the command
fails. Where int8 loses, the table says so. Without a GPU `--shapes tiny` runs the whole program, by the clock.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention import attention_rows
from benchmarks.chain import chain_rows
from benchmarks.goals import goal_rows, judge
from benchmarks.linears import Linear, Weights, compile_all, linear_rows
from benchmarks.ops import gated_rows, op_rows
from benchmarks.peers import PEERS, Peer, peers
from benchmarks.report import RESULTS, birth_certificate, device_name, write
from benchmarks.shapes import SHAPES, linear_sizes
from benchmarks.tables import table
from benchmarks.timing import Roofs, measure_roofs
from service.models.config import ModelConfig
from service.models.devices import pick_device

MODELS = ("llama-3.1-8b", "qwen2.5-7b", "llama-2-13b", "opt-6.7b")
OURS = ("w8a8", "fp16 kv")
PARTS = ("linear", "ops", "attention", "chain")

# Both sides of every place where a tile ends, and a number that divides by nothing.
DENSE = (1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 1000, 1024, 2048, 4096, 8192)
SPARSE = (1, 16, 64, 256, 1024, 4096)

Section = tuple[str, Callable[[], list[dict[str, Any]]]]


@dataclass(frozen=True, slots=True)
class Scenes:
    """Sizes of what is measured beside the Linears. prefills, decodes: (requests, context)."""

    max_model_len: int
    op_tokens: Sequence[int]
    prefills: Sequence[tuple[int, int]]
    decodes: Sequence[tuple[int, int]]
    chain_tokens: Sequence[int]
    chain_context: int
    chain_prefill: int


SCENES = {
    "llama-3.1-8b": Scenes(
        max_model_len=8192,
        op_tokens=(1, 16, 128, 2048, 8192),
        prefills=((16, 2048), (1, 8192)),
        decodes=((1, 512), (1, 2048), (1, 8192), (32, 512), (32, 2048), (32, 8192), (256, 512)),
        chain_tokens=(1, 16, 64),
        chain_context=512,
        chain_prefill=2048,
    ),
    "tiny": Scenes(
        max_model_len=256,
        op_tokens=(1, 16),
        prefills=((2, 33),),
        decodes=((1, 64), (3, 50)),
        chain_tokens=(1, 16),
        chain_context=32,
        chain_prefill=64,
    ),
}


@torch.no_grad()
def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    # Each capture of a graph collects garbage first: 0.1 s each, with all that is imported here.
    gc.freeze()
    deadline = time.perf_counter() + args.budget_s
    device = pick_device("auto")
    certificate = birth_certificate(args.commit)
    roofs = measure_roofs(device)
    certificate |= {"copy_gb_per_s": roofs.copy_gb_per_s, "int8_tops_by_data_sheet": roofs.int8_tops}
    certificate["timed by"] = "CUDA graphs" if device.type == "cuda" else "CPU clock: a smoke test, not a result"
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    try:
        for name, measure_section in _sections(args, device, roofs):
            if time.perf_counter() > deadline:
                left_out.append(name)
                continue
            started = time.perf_counter()
            rows += measure_section()
            print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    finally:
        # What was measured before an error is worth having, on a machine that is paid by the minute.
        certificate["left out for time"] = left_out
        goals = judge(rows, certificate["device"])
        write(_result_path(args.out), certificate, rows + goal_rows(goals))
        print(f"{certificate['device']}, torch {certificate['torch']}, commit {certificate['commit']}")
        print(f"copy {roofs.copy_gb_per_s:.0f} GB/s, int8 {roofs.int8_tops} TOPS, timed by {certificate['timed by']}")
        print("\n".join(table(rows, goals, certificate["device"])))
        if left_out:
            print(f"left out for time: {', '.join(left_out)}")
    if has_failed(rows):
        raise SystemExit("a kernel of ours gave a wrong result or could not run: see the rows above")


def has_failed(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether any check failed, or anything of ours that every GPU runs has no time."""
    return any("wrong" in row or ("absent" in row and row["variant"] in OURS) for row in rows)


def _sections(args: argparse.Namespace, device: torch.device, roofs: Roofs) -> Iterator[Section]:
    """The run in pieces, the most telling first: what is left out for time is the end."""
    others = peers(args.peers)
    linears = {shape: _linears(shape) for shape in args.shapes}
    weights = None
    if "linear" in args.only:
        weights = Weights({(linear.n, linear.k) for shape in linears.values() for linear in shape}, device)
    for shape in args.shapes:
        if weights is not None:
            yield from _linear_sections(linears[shape], _tokens(args, shape), weights, others, roofs)
        if shape in SCENES:
            yield from _scene_sections(shape, args, device, roofs)


def _linear_sections(
    linears: Sequence[Linear], tokens: Sequence[int], weights: Weights, others: dict[str, Peer], roofs: Roofs
) -> Iterator[Section]:
    def compile_first() -> list[dict[str, Any]]:
        compile_all(linears, tokens, weights)
        return []

    yield f"{linears[0].shape} compiling", compile_first
    for linear in linears:
        yield f"{linear.shape} {linear.layer}", partial(linear_rows, linear, tokens, weights, others, roofs)


def _scene_sections(shape: str, args: argparse.Namespace, device: torch.device, roofs: Roofs) -> Iterator[Section]:
    scenes = SCENES[shape]
    config = _config(shape, scenes.max_model_len, device)
    # Every row has a position, and the rotary table ends at max_model_len.
    op_tokens = [t for t in args.tokens or scenes.op_tokens if t <= scenes.max_model_len]
    if "ops" in args.only:
        yield f"{shape} ops", partial(op_rows, shape, config, op_tokens, roofs)
        yield f"{shape} gate_up and gate", partial(gated_rows, shape, config, op_tokens, roofs)
    if "attention" in args.only:
        yield f"{shape} attention", partial(attention_rows, shape, config, scenes.prefills, scenes.decodes, roofs)
    if "chain" in args.only:
        sizes = scenes.chain_tokens, scenes.chain_context, scenes.chain_prefill
        yield f"{shape} chain", partial(chain_rows, shape, config, *sizes, roofs)


def _linears(shape: str) -> list[Linear]:
    return [Linear(shape, layer, n, k) for layer, (n, k) in linear_sizes(SHAPES[shape]).items()]


def _config(shape: str, max_model_len: int, device: torch.device) -> ModelConfig:
    """The model's sizes, its rotary table on the device."""
    config = ModelConfig.of(SHAPES[shape], max_model_len)
    return replace(config, rope=config.rope.to(device))


def _tokens(args: argparse.Namespace, shape: str) -> Sequence[int]:
    chosen: Sequence[int] = args.tokens or (DENSE if shape == MODELS[0] else SPARSE)
    return chosen


def _result_path(out: str | None) -> Path:
    """The file asked for, or a file named after the GPU in the folder asked for."""
    path = Path(out) if out else RESULTS
    if path.suffix == ".json":
        return path
    words = re.findall(r"[a-z]*\d+[a-z]*", device_name().lower()) if torch.cuda.is_available() else ["cpu"]
    return path / f"kernels-{words[0] if words else 'gpu'}.json"


def _words(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        words = text.split(",")
        unknown = sorted(set(words) - set(allowed))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(allowed)}")
        return words

    return read


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=_words(list(SHAPES)), default=list(MODELS), help="default: all but tiny")
    parser.add_argument("--only", type=_words(PARTS), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument(
        "--tokens", type=lambda text: [int(n) for n in text.split(",")], help="of Linears and ops, for every shape"
    )
    parser.add_argument(
        "--peers", type=_words([*PEERS, "none"]), default=list(PEERS), help="torchao, gemlite where installed, or none"
    )
    parser.add_argument("--budget-s", type=float, default=240.0, help="no new section starts after this time")
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", help="JSON file, or a folder; default: benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
