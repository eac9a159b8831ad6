"""Attention over a paged cache with each of many tiles, float16 and int8: what `kernels.tiles` chooses from.

    python -m benchmarks.attention_tiles                         llama-3.1-8b, on a GPU
    python -m benchmarks.attention_tiles --only decode --few --out benchmarks/results/NAME.json

All tiles of a scene take turns in one process. A tile is timed only if its result is right, and skipped if a program of
it needs more shared memory or registers than the GPU has. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from benchmarks.attention import Scene, paged_calls
from benchmarks.report import birth_certificate, quantiles, write
from benchmarks.shapes import SHAPES
from benchmarks.timing import Call, measure
from kernels import attention, decode_attention
from kernels.dependent import HOPPER
from kernels.tiles import AttentionTile, current_gpu, decode_tile, prefill_tile
from service.models.config import ModelConfig

PREFILLS = ((1, 512), (8, 512), (1, 2048), (16, 2048), (1, 16384))
DECODES = ((1, 512), (1, 8192), (8, 512), (32, 512), (256, 512), (128, 2048), (32, 8192))
"""(requests, context)."""

TILES = {
    "prefill": [
        AttentionTile(block_m, block_n, num_warps=num_warps, num_stages=num_stages)
        for block_m, num_warps in ((128, 8), (64, 4))
        for block_n, num_stages in ((64, 2), (64, 3), (64, 4), (128, 2), (128, 3))
    ],
    "decode": [
        AttentionTile(16, block_n, num_warps=num_warps, num_stages=num_stages)
        for block_n, num_warps in ((128, 4), (64, 4), (256, 8))
        for num_stages in (2, 3, 4)
    ],
}
T = TypeVar("T")

FLOOR_S = 50e-6
"""About what a call takes, for how often a graph repeats it."""

Candidate = tuple[str, bool, AttentionTile | None]
"""prefill or decode, whether the cache is int8, and the tile; None for the kernel that Hopper has."""


def candidates(what: str) -> list[Candidate]:
    """Every tile over both caches; decodes over int8 ones with values in pairs and with int8 products, too."""
    plain: list[Candidate] = [(what, is_int8, tile) for is_int8 in (False, True) for tile in TILES[what]]
    if what == "prefill":
        return [*plain, *own_of_hopper(what)]
    in_pairs = [tile._replace(in_pairs=True, is_int8=is_int8) for is_int8 in (False, True) for tile in TILES[what]]
    return [*plain, *((what, True, tile) for tile in in_pairs), *own_of_hopper(what)]


def own_of_hopper(what: str) -> list[Candidate]:
    """Its kernel over both caches, where there is one; for heads that it does not take it is the other one."""
    has_own = current_gpu(torch.device("cuda", 0)).capability == HOPPER
    return [(what, is_int8, None) for is_int8 in (False, True)] if has_own else []


def used(what: str) -> list[Candidate]:
    """The tiles of Llama-3.1-8B's heads over both caches, and Hopper's own kernel."""
    choose = prefill_tile if what == "prefill" else decode_tile
    gpu = current_gpu(torch.device("cuda", 0))
    tiles: list[Candidate] = [(what, is_int8, choose(gpu, 128, 2, 1 if is_int8 else 2)) for is_int8 in (False, True)]
    return [*tiles, *own_of_hopper(what)]


def scene_of(shape: str, what: str, batch: int, context: int) -> Scene:
    config = ModelConfig.of(SHAPES[shape], max(each for _, each in PREFILLS + DECODES) + 16)
    return Scene(config, batch, context, context if what == "prefill" else 1, torch.device("cuda"))


def calls_of(scene: Scene, is_int8: bool, what: str, tile: AttentionTile | None) -> Sequence[Call]:
    """The checked calls of a scene with one tile."""

    def with_tile(call: Callable[[], T]) -> T:
        if tile is None:
            return call()
        module, suits = (attention, "suits_prefill") if what == "prefill" else (decode_attention, "suits_hopper")
        with patch.object(module, suits, lambda _: False), patch.object(attention, f"{what}_tile", lambda *_: tile):
            return call()

    return [partial(with_tile, call) for call in with_tile(partial(paged_calls, scene, is_int8))]


def compiled(shape: str, what: str, is_int8: bool, tile: AttentionTile | None) -> str:
    """Run a tile once, in a process of its own, so that all are compiled at once. Returns what is wrong with it."""
    try:
        calls_of(scene_of(shape, what, 2, 512), is_int8, what, tile)
    except Exception as error:  # noqa: BLE001 (whatever Triton says of a tile that does not fit)
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--only", choices=TILES)
    parser.add_argument("--few", action="store_true", help="only the tiles in use, and Hopper's own kernel")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    kinds = [args.only] if args.only else list(TILES)
    wanted = [candidate for what in kinds for candidate in (used(what) if args.few else candidates(what))]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        faults = list(pool.map(partial(compiled, args.shape), *zip(*wanted, strict=True)))
    for row, fault in zip(wanted, faults, strict=True):
        if fault:
            print(*row, fault.splitlines()[0][:160])
    usable = [row for row, fault in zip(wanted, faults, strict=True) if not fault]
    rows = []
    for what in kinds:
        for batch, context in PREFILLS if what == "prefill" else DECODES:
            rows += _scene_rows(args.shape, what, batch, context, [row[1:] for row in usable if row[0] == what])
    if args.out:
        write(Path(args.out), birth_certificate(args.commit), rows)
    print(json.dumps(rows))


def _scene_rows(
    shape: str, what: str, batch: int, context: int, tiles: list[tuple[bool, AttentionTile | None]]
) -> list[dict[str, Any]]:
    scene = scene_of(shape, what, batch, context)
    contenders: dict[str, Callable[[], Sequence[Call]]] = {
        json.dumps([is_int8, tile]): partial(calls_of, scene, is_int8, what, tile) for is_int8, tile in tiles
    }
    rows = []
    for name, times in measure(contenders, FLOOR_S).items():
        is_int8, tile = json.loads(name)
        row = {"op": what, "batch": batch, "context": context, "cache": "int8" if is_int8 else "fp16", "tile": tile}
        if isinstance(times, list):
            row |= {f"us_{key}": 1e6 * value for key, value in quantiles(times).items()}
        else:
            row |= {"absent": times.reason}
        rows.append(row)
    for cache in ("fp16", "int8"):
        timed = sorted(
            (row for row in rows if row["cache"] == cache and "us_p50" in row), key=lambda row: row["us_p50"]
        )
        best = ", ".join(f"{row['us_p50']:.1f} {row['tile']}" for row in timed[:5])
        print(f"{what} {batch} x {context} {cache}: {best}", flush=True)
    torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main()
