"""What launches cost the host where no graph is: each op, a decoder layer, and a whole forward pass.

    python -m benchmarks.launches

Without a GPU the same launches end in a driver that runs nothing (`benchmarks.stand_in`): all of the host's work but
the driver's own. Shapes are those of Llama-3.1-8B in W8A8. Times are the thread's processor time, which other programs
of the machine hardly change. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs

import kernels
from benchmarks.report import RESULTS, birth_certificate, quantiles, write
from benchmarks.shapes import SHAPES
from benchmarks.stand_in import stand_in
from kernels import Quantized, Rows, ToInt8, gemm
from kernels.tiles import Tile, choose
from quant.linear import InputCodes, Int8Linear
from quant.part import WHOLE, Part, taken
from service.models.attention import KVCache
from service.models.config import ModelConfig
from service.models.decoder import Decoder

SHAPE = "llama-3.1-8b"
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 64, 256, 8192
ROUNDS, REPEATS = 12, 6
"""Every case in turn, several times over, so that a busy minute of the machine is not one case's."""
LAUNCHES_A_REPEAT = 300
"""Fewer than the driver queues: a full queue would make the host wait for the GPU."""

TILES = {
    "stream": Tile("stream", 16, 64, 128, num_warps=4, num_stages=20),
    "swapped": Tile("swapped", 16, 64, 256, num_warps=4, num_stages=4),
    "plain": Tile("plain", 128, 128, 128, num_warps=8, num_stages=3),
    "pingpong": Tile("pingpong", 128, 128, 128, num_warps=4, num_stages=4),
}

Call = Callable[[], object]


class BlankWeights:
    """Weights of a model's shapes that nobody has written."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device

    def tensor(self, name: str, shape: tuple[int, ...], part: Part = WHOLE) -> Tensor:  # noqa: ARG002 (all are alike)
        return taken(torch.empty(shape, dtype=self.dtype, device=self.device), part)

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        has_bias: bool,
        *,
        is_transposed: bool = False,  # noqa: ARG002 (nothing has a layout)
        part: Part = WHOLE,  # noqa: ARG002 (one rank holds all)
    ) -> Int8Linear:
        bias = self.tensor(f"{name}.bias", (out_features,)) if has_bias else None
        return Int8Linear(
            torch.empty((out_features, in_features), dtype=torch.int8, device=self.device),
            torch.empty(out_features, device=self.device),
            input_codes=InputCodes("token"),
            out_dtype=self.dtype,
            bias=bias,
        )

    def differs(self, name: str, other: str) -> bool:  # noqa: ARG002 (nothing is stored)
        return False


@torch.inference_mode()
def main() -> None:
    args = _arguments()
    has_gpu = torch.cuda.is_available()
    certificate = birth_certificate(args.commit) | {"driver": "CUDA" if has_gpu else "stand-in, compiled for sm_90"}
    if not has_gpu:
        stand_in()
    rows = launch_rows(args.tokens, torch.device("cuda" if has_gpu else "cpu"))
    write(args.out or RESULTS / f"launches-{'gpu' if has_gpu else 'cpu'}.json", certificate, rows)
    print(_table(rows))
    print(json.dumps(rows))


def launch_rows(tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """Launches, and host us a call and a launch, of every op and of the model around them."""
    calls = dict(cases(tokens, device))
    launches = {name: count(call) for name, call in calls.items()}
    times_us: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.freeze()
    for name, call in [*calls.items()] * ROUNDS:
        call()
        calls_a_repeat = max(1, LAUNCHES_A_REPEAT // launches[name])
        times_us[name] += [_time_us(call, calls_a_repeat) for _ in range(REPEATS)]
    rows = []
    for name, values in times_us.items():
        us = {"least": min(values), **quantiles(values)}
        row = {"what": "launch", "op": name, "tokens": tokens, "launches": launches[name]}
        row |= {f"us_{at}": value for at, value in us.items()}
        rows.append(row | {f"us_a_launch_{at}": us[at] / launches[name] for at in ("least", "p50")})
    return rows


def count(call: Call) -> int:
    """Launches of a call."""
    seen: list[object] = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        call()
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    return len(seen)


def cases(T: int, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Every op, a layer and a forward pass of T tokens: T decodes, or one prompt."""
    hf = SHAPES[SHAPE]
    with mock.patch.object(hf, "num_hidden_layers", 1):
        config = ModelConfig.of(hf, MAX_MODEL_LEN)
    decoder = Decoder(config, BlankWeights(torch.float16, device))
    # Layers differ only in addresses: one stands for all.
    decoder.layers *= hf.num_hidden_layers
    decoder.cos_sin *= hf.num_hidden_layers
    layer, cos_sin = decoder.layers[0], decoder.cos_sin[0]
    shape = (NUM_BLOCKS, BLOCK_SIZE, config.num_kv_heads, config.head_size)
    cache = KVCache(*(torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2)))
    x = torch.empty((T, config.hidden_size), dtype=torch.float16, device=device)
    decode, prefill = (_rows(T, count, config.num_kv_heads, device) for count in (T, 1))

    yield from _op_cases(x, device)
    qkv = torch.empty((T, layer.attention.qkv.shape[0]), dtype=torch.float16, device=device)
    for name, rows in (("decode", decode), ("prefill", prefill)):
        where = rows, cos_sin, cache.k, cache.v, config.num_heads, config.scale, ToInt8()
        yield f"rotary_attention, {name}", partial(kernels.rotary_attention, qkv, *where)
    for name, rows in (("decode", decode), ("prefill", prefill)):
        yield f"layer, {name}", partial(layer, x, x, rows, cos_sin, cache)
        yield f"forward, {name}", partial(decoder, rows.slots, rows, [cache] * len(decoder.layers))


def _op_cases(x: Tensor, device: torch.device) -> Iterator[tuple[str, Call]]:
    """The norm, the rounding and the products, with every kind of tile; x [T, K]."""
    T, K = x.shape
    weight, to = torch.empty(K, dtype=x.dtype, device=device), ToInt8()
    yield "rms_norm, residual, to int8", partial(kernels.rms_norm, x, weight, 1e-5, x, to)
    yield "quantize_rows", partial(kernels.quantize_rows, x)
    x_q = Quantized(torch.empty((T, K), dtype=torch.int8, device=device), torch.empty(T, device=device))
    weights = BlankWeights(x.dtype, device)
    qkv, gate_up = (weights.linear("", n, K, has_bias=False) for n in (6144, 28672))
    for name, tile in TILES.items():
        yield f"int8_linear, {name}", _with_tile(tile, partial(qkv, x_q))
    operands = x_q, gate_up.weight_q, gate_up.weight_scale, None, x.dtype, to
    yield "int8_gated_linear, to int8", partial(kernels.int8_gated_linear, *operands)


def _with_tile(tile: Tile, call: Call) -> Call:
    """The call with a tile in place of the table's."""

    def chosen() -> object:
        vars(gemm)["choose"] = lambda *_: tile
        try:
            return call()
        finally:
            vars(gemm)["choose"] = choose

    return chosen


def _rows(num_tokens: int, num_requests: int, num_kv_heads: int, device: torch.device) -> Rows:
    """T tokens of as many requests, each at the start of its context, or of one."""
    step = torch.arange(num_tokens + 1, dtype=torch.int32, device=device)
    return Rows(
        positions=step[:num_tokens] if num_requests == 1 else torch.zeros_like(step[:num_tokens]),
        slots=step[:num_tokens],
        query_starts=step[:: num_tokens // num_requests].contiguous(),
        context_lens=torch.full_like(step[:num_requests], num_tokens // num_requests),
        block_tables=torch.zeros((num_requests, MAX_MODEL_LEN // BLOCK_SIZE), dtype=torch.int32, device=device),
        is_decode=num_requests == num_tokens,
        arrivals=torch.zeros((num_requests, num_kv_heads), dtype=torch.int32, device=device),
        is_alone=num_requests == num_tokens,
    )


def _time_us(call: Call, times: int) -> float:
    """Host us of a call, on the mean of some."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.thread_time()
    for _ in range(times):
        call()
    return 1e6 * (time.thread_time() - started) / times


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | launches | us, least | p20 | p50 | p80 | us a launch, least | p50 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = [f"us_{at}" for at in ("least", "p20", "p50", "p80", "a_launch_least", "a_launch_p50")]
    lines += [
        f"| {row['op']} | {row['launches']} | {' | '.join(f'{row[name]:.1f}' for name in names)} |" for row in rows
    ]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16, help="of a step")
    parser.add_argument("--out", type=Path, default=None, help="file of the result")
    parser.add_argument("--commit", default=None, help="what is measured, where there is no git history")
    return parser.parse_args()


if __name__ == "__main__":
    main()
