"""int8 products of many tokens by each of Hopper's kernels, on end, when the card's power sets its clock.

    python -m benchmarks.sustained                         Llama-3.1-8B's Linears, on a GPU

A tile is timed only if its product is exact. All tiles of a product take turns, each for `tune.SUSTAINED_S` after as
long to warm up. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import birth_certificate, quantiles, write
from kernels.tiles import Tile, choose, current_gpu
from kernels.tune import LinearShape, Product

SHAPES = (
    LinearShape(6144, 4096),
    LinearShape(4096, 4096),
    LinearShape(28672, 4096, is_gated=True),
    LinearShape(4096, 14336),
)
TOKENS = (1024, 1792, 4096, 8192)
GROUPS = (8, 16, 32)
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    rows = [row for shape in SHAPES for tokens in TOKENS for row in product_rows(shape, tokens)]
    if args.out:
        write(Path(args.out), birth_certificate(args.commit), rows)
    print(json.dumps(rows))


def product_rows(shape: LinearShape, tokens: int) -> list[dict[str, Any]]:
    """A row for each tile; is_used: whether it is the one that a server takes."""
    used = choose(current_gpu(torch.device("cuda", 0)), shape.n, shape.k, tokens)
    product = Product(shape, tokens, (tokens,))
    wanted = [tile for tile in dict.fromkeys([used, *tiles(tokens)]) if product.is_exact(tile)]
    rows = []
    for tile, taken in product.times_us(wanted, TURNS, is_sustained=True).items():
        row = {"what": "product", **shape._asdict(), "tokens": tokens, "tile": tile._asdict(), "is_used": tile == used}
        row |= {f"us_{key}": value for key, value in quantiles(taken).items()}
        row["tops"] = 2e-6 * tokens * shape.n * shape.k / row["us_p50"]
        rows.append(row)
    shown = ", ".join(f"{row['us_p50']:.1f} {row['tile']['kernel']} {row['tile']['group']}" for row in rows)
    print(f"{shape.n} x {shape.k}, {tokens} tokens: {shown}", flush=True)
    return rows


def tiles(tokens: int) -> list[Tile]:
    """The largest tile of both kernels, in groups of up to as many as there are."""
    groups = [group for group in GROUPS if group * 128 <= max(tokens, 128 * GROUPS[0])]
    pingpong, cooperative = Tile("pingpong", 128, 128, 128, 4, 5), Tile("cooperative", 128, 256, 128, 4, 4)
    return [tile._replace(group=group) for tile in (pingpong, cooperative) for group in groups]


if __name__ == "__main__":
    main()
