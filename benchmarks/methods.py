"""Speed of the Linears of each quantization method beside float16's, quantization of the activations included.

    python -m benchmarks.methods                                   Llama-3.1-8B's Linears at 1, 16, 256 and 2048 tokens
    python -m benchmarks.methods --out benchmarks/results/methods-h100.json

Each Linear is called on random float16 rows, which every int8 method rounds first; in a decoder of w8a8 or zeroquant
the fused norm before it would have done so. `--outliers` columns of the rows are beyond llm-int8's threshold. A method
is timed only after its result agreed with the exact product in the same run.
Without a GPU `--shape tiny --tokens 1,16` runs the whole program, by the clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import birth_certificate, write
from benchmarks.shapes import SHAPES, linear_sizes
from benchmarks.timing import Call, Roofs, Work, add_ratios, expect, measure, measure_roofs, num_copies, result_row
from kernels import CODE_MAX, quantize_rows, reference
from quant.linear import InputCodes, Int8Linear
from service.models.devices import pick_device

METHODS = ("fp16", "w8a8", "zeroquant", "llm-int8")
GROUP_SIZE, THRESHOLD = 128, 6.0
CHECKED_ROWS = 64


@dataclass(frozen=True, slots=True)
class Case:
    """One Linear at one number of tokens.

    x: [T, K] float16, `num_outliers` of its columns beyond the threshold in one row each.
    codes: [N, K] int8, in as many copies as a run rotates through.
    """

    layer: str
    x: Tensor
    codes: Sequence[Tensor]
    num_outliers: int

    @property
    def work(self) -> Work:
        """Of any int8 method: codes and float16 activations in, y out; scales are few."""
        (tokens, k), n = self.x.shape, len(self.codes[0])
        return Work(n * k + 2 * tokens * (k + n), 2.0 * n * k * tokens, is_int8=True)

    @property
    def float_work(self) -> Work:
        (tokens, k), n = self.x.shape, len(self.codes[0])
        return Work(2 * (n * k + tokens * (k + n)), 2.0 * n * k * tokens)


def method_rows(
    shape: str, all_tokens: Sequence[int], num_outliers: int, roofs: Roofs, device: torch.device
) -> list[dict[str, Any]]:
    """Time of each method for each Linear of a model's layer at each number of tokens."""
    rows = []
    for layer, (n, k) in linear_sizes(SHAPES[shape]).items():
        codes = [_codes(n, k, device) for _ in range(num_copies(n * k))]
        for tokens in all_tokens:
            case = Case(layer, _activation(tokens, k, num_outliers, device), codes, num_outliers)
            rows += _case_rows(shape, case, roofs)
    return rows


def _case_rows(shape: str, case: Case, roofs: Roofs) -> list[dict[str, Any]]:
    makers: dict[str, Callable[[], Sequence[Call]]] = {"fp16": partial(_fp16, case)}
    makers |= {method: partial(_int8, case, method) for method in METHODS[1:]}
    tokens, k = case.x.shape
    fields = {"what": "method", "shape": shape, "layer": case.layer, "n": len(case.codes[0]), "k": k, "tokens": tokens}
    rows = []
    for method, measured in measure(makers, roofs.floor_s(case.work)).items():
        named = fields | {"variant": method} | ({"outliers": case.num_outliers} if method == "llm-int8" else {})
        rows.append(result_row(named, measured, case.float_work if method == "fp16" else case.work, roofs))
    add_ratios(rows, "fp16", "speedup")
    return rows


def _fp16(case: Case) -> list[Call]:
    return [partial(torch.mm, case.x, (codes * _spread(codes)).half().T) for codes in case.codes]


def _int8(case: Case, method: str) -> list[Call]:
    linears = [_linear(codes, method) for codes in case.codes]
    _check(linears[0], case.x)
    return [partial(linear, case.x) for linear in linears]


def _linear(codes: Tensor, method: str) -> Int8Linear:
    n, k = codes.shape
    shape = (n, k // GROUP_SIZE) if method == "zeroquant" else (n,)
    scale = (0.5 + torch.rand(shape, device=codes.device)).mul_(_spread(codes))
    input_codes = InputCodes("token", outliers=THRESHOLD if method == "llm-int8" else None)
    return Int8Linear(codes, scale, input_codes=input_codes, out_dtype=torch.float16)


def _check(linear: Int8Linear, x: Tensor) -> None:
    """Compare the Linear with float64 products of its own operands, for up to `CHECKED_ROWS` rows of x, all columns.

    Raises:
        WrongResult: an element is further away than float16's rounding of both parts and float32's of the sums allow.
    """
    y = linear(x)
    some = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS), device=x.device).long()
    is_outlier = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    if linear.input_codes.outliers is not None:
        is_outlier = (x.abs() >= linear.input_codes.outliers).any(0)
    split = x[some].masked_fill(is_outlier, 0)
    rounded = reference.quantize_rows(split.cpu()) if linear.input_codes.outliers is not None else quantize_rows(split)
    weight = linear.weight_q.double()
    groups = linear.weight_scale.reshape(len(weight), -1).double()
    weight *= groups.repeat_interleave(weight.shape[1] // groups.shape[1], dim=1)
    real = (rounded.codes.double() * rounded.scale.double()[:, None]).to(x.device)
    products = real @ weight.T, x[some][:, is_outlier].double() @ weight[:, is_outlier].T
    # Of sums whose terms cancel, what float32 loses is relative to the terms.
    largest = real.abs() @ weight.abs().T + x[some][:, is_outlier].double().abs() @ weight[:, is_outlier].abs().T
    want = products[0] + products[1]
    bound = 2.0**-11 * (products[0].abs() + 2 * want.abs()) + 2.0**-19 * largest + 2.0**-24
    expect(((y[some].double() - want).abs() <= bound).all(), f"differs at {len(x)} tokens")


def _activation(tokens: int, k: int, num_outliers: int, device: torch.device) -> Tensor:
    x = torch.randn(tokens, k, device=device, dtype=torch.float16).clamp_(-5.5, 5.5)
    for i in range(num_outliers):
        x[i % tokens, i * k // num_outliers] = 8 * THRESHOLD
    return x


def _codes(n: int, k: int, device: torch.device) -> Tensor:
    return torch.randint(-CODE_MAX, CODE_MAX + 1, (n, k), dtype=torch.int8, device=device)


def _spread(codes: Tensor) -> float:
    """The scale at which uniform codes make y of order 1."""
    spread: float = 3**0.5 / CODE_MAX * codes.shape[1] ** -0.5
    return spread


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per Linear and number of tokens: microseconds of each method, and float16's time over it."""
    lines = [
        f"{'Linear':<9}{'tokens':>7}{'fp16 us':>10}" + "".join(f"{f'{name} us':>15}{'x':>6}" for name in METHODS[1:])
    ]
    cases = dict.fromkeys((row["layer"], row["tokens"]) for row in rows)
    for layer, tokens in cases:
        case = {row["variant"]: row for row in rows if (row["layer"], row["tokens"]) == (layer, tokens)}
        cells = "".join(
            f"{case[name]['us_p50']:>15.1f}{case[name].get('speedup', float('nan')):>6.2f}"
            if "us_p50" in case[name]
            else f"{'wrong' if 'wrong' in case[name] else 'absent':>15}{'':>6}"
            for name in METHODS[1:]
        )
        lines.append(f"{layer:<9}{tokens:>7}{case['fp16'].get('us_p50', float('nan')):>10.1f}{cells}")
    return lines


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 256, 2048])
    parser.add_argument("--outliers", type=int, default=7, help="outlier columns of llm-int8's rows")
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = pick_device("auto")
    roofs = measure_roofs(device)
    rows = method_rows(args.shape, args.tokens, args.outliers, roofs, device)
    certificate = birth_certificate(args.commit) | {"copy_gb_per_s": roofs.copy_gb_per_s}
    certificate["timed by"] = "CUDA graphs" if device.type == "cuda" else "CPU clock: a smoke test, not a result"
    if args.out:
        write(args.out, certificate, rows)
    print(f"{certificate['device']}, {args.shape}, {args.outliers} outlier columns, timed by {certificate['timed by']}")
    print("\n".join(table(rows)))
    failed = [row for row in rows if "wrong" in row or "absent" in row]
    if failed:
        raise SystemExit(f"a method gave a wrong result or could not run: {failed[0]}")


if __name__ == "__main__":
    main()
