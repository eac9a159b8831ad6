"""The int8 product on a CPU, by each way that it can be computed, beside the float products of torch.

    python -m benchmarks.cpu_products

All Linears of the demo model's layers once, so that no weight is in a cache when it is read; the ways take turns. Each
int8 way is checked against the exact sums first. `torch._int_mm` is timed for few rows alone where the processor has no
instructions for it. The ratio is to the faster of the float products.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.report import RESULTS, birth_certificate, quantiles, write
from kernels.cpu import product
from kernels.cpu.library import WHY_NOT

NUM_LAYERS = 30
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""(out, in) of qkv, o, gate and up, and down."""
FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
SLOW_ROWS = 4
"""Most rows of `torch._int_mm` without instructions for int8: 16 take a second."""

Way = Callable[[Tensor, Tensor, Tensor], object]


def in_floats(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    """What the int8 products are held against; it makes its own result."""
    return linear(x, weight)


def ways() -> dict[str, Way]:
    """The int8 products that can run here."""
    every: dict[str, Way] = {
        "C": product.in_c,
        "C, VNNI": product.by_vnni,
        "C, AMX": product.by_amx,
        "torch._int_mm": product.by_int_mm,
        "float32 sums": product.by_float_sums,
    }
    can_run = {"C": WHY_NOT is None, "C, VNNI": product.HAS_VNNI, "C, AMX": product.HAS_AMX}
    return {name: way for name, way in every.items() if can_run.get(name, True)}


def multiply(way: Way, inputs: list[Tensor], layers: list[list[Tensor]], sums: list[Tensor]) -> None:
    for layer in layers:
        for x, weight, acc in zip(inputs, layer, sums, strict=True):
            way(x, weight, acc)


def check(name: str, way: Way, inputs: list[Tensor], layer: list[Tensor], sums: list[Tensor]) -> None:
    for x, weight, acc in zip(inputs, layer, sums, strict=True):
        way(x, weight, acc)
        if not torch.equal(acc.double(), x.double() @ weight.double().t()):
            raise SystemExit(f"{name} is not exact for {len(x)} rows of {list(weight.shape)}")


def rows_of(all_num_rows: list[int], rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)

    weights = [[codes(*shape) for shape in SHAPES] for _ in range(NUM_LAYERS)]
    floats = {dtype: [[weight.to(dtype) for weight in layer] for layer in weights] for dtype in FLOATS}
    rows = []
    for num_rows in all_num_rows:
        inputs = [codes(num_rows, k) for _, k in SHAPES]
        sums = [torch.empty(num_rows, n, dtype=torch.int32) for n, _ in SHAPES]
        runs: dict[str, Callable[[], object]] = {}
        for name, way in ways().items():
            if name == "torch._int_mm" and not product.HAS_INT8_DOT and num_rows > SLOW_ROWS:
                continue
            check(name, way, inputs, weights[0], sums)
            runs[name] = partial(multiply, way, inputs, weights, sums)
        for dtype, layers in floats.items():
            runs[FLOATS[dtype]] = partial(multiply, in_floats, [x.to(dtype) for x in inputs], layers, sums)
        rows += timed(runs, num_rows, rounds)
    return rows


def timed(runs: dict[str, Callable[[], object]], num_rows: int, rounds: int) -> list[dict[str, Any]]:
    """A row of each way, and what it gains on the faster of the floats."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                times[name].append((time.perf_counter() - started) * 1e3)
    spread = {name: quantiles(each) for name, each in times.items()}
    float_ms = min(spread[name]["p50"] for name in FLOATS.values())
    found = []
    for name, ms in spread.items():
        ratio = float_ms / ms["p50"]
        print(f"{num_rows:>5} rows {name:>14} {ms['p50']:9.1f} ms {ratio:6.2f}", flush=True)
        found.append({"rows": num_rows, "way": name, **{f"ms_{q}": each for q, each in ms.items()}, "ratio": ratio})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 128, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-products.json")
    args = parser.parse_args()
    write(args.out, birth_certificate(), rows_of(args.rows, args.rounds))


if __name__ == "__main__":
    main()
