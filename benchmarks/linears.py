"""Every Linear of a model's decoder layer at every number of tokens: ours beside torch's and the peers'."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.peers import Peer
from benchmarks.timing import Call, Roofs, Unsupported, Work, add_ratios, expect, measure, num_copies, result_row
from kernels import CODE_MAX, Quantized

CHECKED_ROWS = 128
"""Rows compared with the exact product, spread evenly over all of them: every tile of 64 tokens is met."""

BOTH_ROUNDINGS = {"torchao", "gemlite"}
"""Contenders whose time includes the quantization of the activations."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One Linear of one model: y [T, N] = x [T, K] weight^T."""

    shape: str
    layer: str
    n: int
    k: int

    def work(self, variant: str, tokens: int) -> Work:
        """Bytes and operations of one call: weights, activations, scales in; y out."""
        n, k = self.n, self.k
        weight, x, y = n * k, tokens * k, tokens * n
        num_bytes = {
            "w8a8": weight + x + 2 * y + 4 * (n + tokens),
            "fp16": 2 * (weight + x + y),
            "int_mm": weight + x + 4 * y,
        }.get(variant, weight + 2 * x + 2 * y + 4 * n)
        return Work(num_bytes, 2.0 * weight * tokens, is_int8=variant != "fp16")


class Weights:
    """Random weights, in as many copies of a size as a run rotates through, cut from two pools that all sizes share."""

    def __init__(self, sizes: Iterable[tuple[int, int]], device: torch.device) -> None:
        self.device = device
        elements = [n * k for n, k in sizes]
        num_codes = max(size * num_copies(size) for size in elements)
        num_floats = max(size * num_copies(2 * size) for size in elements)
        self._codes = torch.randint(-CODE_MAX, CODE_MAX + 1, (num_codes,), dtype=torch.int8, device=device)
        self._floats = torch.randn(num_floats, dtype=torch.float16, device=device).mul_(2.0**-6)

    def codes(self, linear: Linear) -> list[Tensor]:
        return _cut(self._codes, linear)

    def floats(self, linear: Linear) -> list[Tensor]:
        return _cut(self._floats, linear)

    def scale(self, linear: Linear) -> Tensor:
        """One per output channel, about what makes y of order 1."""
        spread: float = 3**0.5 / CODE_MAX * linear.k**-0.5
        return (0.5 + torch.rand(linear.n, device=self.device)).mul_(spread)

    def rows(self, linear: Linear, tokens: int) -> Tensor:
        return torch.randn(tokens, linear.k, device=self.device, dtype=torch.float16)


def compile_all(linears: Sequence[Linear], tokens: Sequence[int], weights: Weights) -> None:
    """Launch our kernel once at every size, from threads, so that it compiles in parallel.

    What fails here is not reported: the case that needs it fails again, and says so.
    """
    if weights.device.type != "cuda":
        return

    def launch(linear: Linear, num_tokens: int) -> None:
        x_q = kernels.quantize_rows(weights.rows(linear, num_tokens))
        kernels.int8_linear(x_q, weights.codes(linear)[0], weights.scale(linear))

    with ThreadPoolExecutor(16) as pool:
        wait([pool.submit(launch, linear, t) for linear in linears for t in tokens])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def linear_rows(
    linear: Linear, all_tokens: Sequence[int], weights: Weights, peers: dict[str, Peer], roofs: Roofs
) -> list[dict[str, Any]]:
    """Every contender at every number of tokens of one Linear."""
    floats = weights.floats(linear)
    rows = []
    for tokens in all_tokens:
        rows += _one_size(linear, tokens, weights, floats, peers, roofs)
        ours = next(row for row in rows[::-1] if row["variant"] == "w8a8")
        took = f"{ours['us_p50']:.1f} us, fp16/int8 {ours.get('speedup', 0):.2f}" if "us_p50" in ours else str(ours)
        print(f"{linear.shape} {linear.layer} {tokens}: {took}", file=sys.stderr, flush=True)
    for peer in peers.values():
        peer.release()
    if weights.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _one_size(
    linear: Linear, tokens: int, weights: Weights, floats: Sequence[Tensor], peers: dict[str, Peer], roofs: Roofs
) -> list[dict[str, Any]]:
    codes, scale, x = weights.codes(linear), weights.scale(linear), weights.rows(linear, tokens)
    x_q = kernels.quantize_rows(x)
    contenders: dict[str, Callable[[], Sequence[Call]]] = {
        "w8a8": partial(_ours, x_q, codes, scale),
        "fp16": partial(_fp16, x, floats),
        "int_mm": partial(_int_mm, x_q.codes, codes),
    }
    for name, peer in peers.items():
        contenders[name] = partial(peer.calls, floats, x)
    times = measure(contenders, roofs.floor_s(linear.work("w8a8", tokens)))
    rows = []
    for variant, measured in times.items():
        row: dict[str, Any] = {"what": "linear", "shape": linear.shape, "layer": linear.layer}
        row |= {"n": linear.n, "k": linear.k, "tokens": tokens, "variant": variant}
        row |= {"quantizes": True} if variant in BOTH_ROUNDINGS else {}
        rows.append(result_row(row, measured, linear.work(variant, tokens), roofs))
    add_ratios(rows, "fp16", "speedup")
    return rows


def _ours(x_q: Quantized, codes: Sequence[Tensor], scale: Tensor) -> list[Call]:
    # What torch.empty hands out next is then NaN: an element that the kernel leaves out is seen.
    torch.full((len(x_q.codes), len(scale)), torch.nan, dtype=torch.float16, device=scale.device)
    y = kernels.int8_linear(x_q, codes[0], scale)
    assert isinstance(y, Tensor)
    check_product(y, x_q, codes[0], scale)
    del y
    return [partial(kernels.int8_linear, x_q, code, scale) for code in codes]


def _fp16(x: Tensor, floats: Sequence[Tensor]) -> list[Call]:
    y = torch.empty((len(x), len(floats[0])), dtype=x.dtype, device=x.device)
    return [partial(torch.mm, x, weight.T, out=y) for weight in floats]


def _int_mm(x_q: Tensor, codes: Sequence[Tensor]) -> list[Call]:
    if x_q.is_cuda and len(x_q) <= 16:
        raise Unsupported("torch._int_mm takes more than 16 rows on CUDA")
    y = torch.empty((len(x_q), len(codes[0])), dtype=torch.int32, device=x_q.device)
    return [partial(torch._int_mm, x_q, code.T, out=y) for code in codes]


def check_product(y: Tensor, x_q: Quantized, weight_q: Tensor, weight_scale: Tensor) -> None:
    """Compare y [T, N] float16 with the exact product, rounded once: up to `CHECKED_ROWS` rows, all columns.

    float64 holds every partial sum of the codes exactly, as |acc| < 2^31.

    Raises:
        WrongResult: an element is more than one unit in the last place away, or not finite.
    """
    tokens = len(x_q.codes)
    rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=y.device).long()
    want = x_q.codes[rows].double() @ weight_q.double().T
    want *= x_q.scale.double().expand(tokens)[rows, None] * weight_scale.double()
    # A unit in the last place is at most 2^-10 of a normal value, and 2^-24 below those.
    error = (y[rows].double() - want).abs()
    bad = ~(error <= want.abs() * 2.0**-10 + 2.0**-24)
    if bool(bad.any()):
        row, column = (int(index[0]) for index in bad.nonzero(as_tuple=True))
        at = f"row {int(rows[row])}, column {column}"
        expect(False, f"{int(bad.sum())} elements, first {at}: {y[rows[row], column]:.6g}, not {want[row, column]:.6g}")


def _cut(pool: Tensor, linear: Linear) -> list[Tensor]:
    size = linear.n * linear.k
    count = num_copies(size * pool.element_size())
    return [pool[i * size : (i + 1) * size].view(linear.n, linear.k) for i in range(count)]
