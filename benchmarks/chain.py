"""A whole decoder layer as a chain, fp16 beside W8A8, each in one CUDA graph of two layers in turn."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.timing import Call, Roofs, Work, add_ratios, expect, measure, result_row
from kernels import Quantized, Rows
from quant.part import WHOLE, Part
from quant.scheme import PRESETS
from service.models.attention import KVCache
from service.models.config import ModelConfig
from service.models.decoder import Layer
from service.models.random_weights import RandomWeights
from service.models.weights import Linear, Weights

INT8_KV = "w8a8 int8 kv"
NUM_LAYERS = 2
"""Each layer's weights are far larger than the L2 cache, so two in turn are never found there."""
BLOCK_SIZE = 64
MAX_CHECKED_TOKENS = 16
MAX_ERROR = 0.02
"""Of the norm, against the layer in plain torch on the CPU: codes that flip at ties, float16 between the ops."""


class Moved:
    """Weights brought to a device as they are asked for: the same layer there."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self.weights = weights
        self.device = device

    def tensor(self, name: str, shape: tuple[int, ...], part: Part = WHOLE) -> Tensor:
        return self.weights.tensor(name, shape, part).to(self.device)

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        has_bias: bool,
        *,
        is_transposed: bool = False,
        part: Part = WHOLE,
    ) -> Linear:
        read = self.weights.linear(name, out_features, in_features, has_bias, is_transposed=is_transposed, part=part)
        return read.to(self.device)

    def differs(self, name: str, other: str) -> bool:
        return self.weights.differs(name, other)


def chain_rows(
    shape: str,
    config: ModelConfig,
    decode_tokens: Iterable[int],
    context: int,
    prefill_tokens: int,
    roofs: Roofs,
) -> list[dict[str, Any]]:
    """Time of one layer: decode steps of T requests at one context, and a prefill of one request."""
    device = config.rope.device
    layers = {variant: _layers(config, variant, device) for variant in ("fp16", "w8a8")}
    layers[INT8_KV] = layers["w8a8"]
    steps = [("decode", tokens, _decode_rows(config, tokens, context)) for tokens in decode_tokens]
    steps.append(("prefill", prefill_tokens, _prefill_rows(config, prefill_tokens)))
    rows = []
    for what, tokens, step in steps:
        contenders = {variant: partial(_calls, config, variant, chain, step) for variant, chain in layers.items()}
        keys = context * tokens if what == "decode" else tokens
        works = {variant: layer_work(config, tokens, keys, variant) for variant in layers}
        case = []
        for variant, measured in measure(contenders, roofs.floor_s(works["w8a8"])).items():
            row = {"what": "chain", "shape": shape, "op": what, "tokens": tokens, "variant": variant}
            row |= {"context": context if what == "decode" else tokens}
            case.append(result_row(row, measured, works[variant], roofs))
        add_ratios(case, "fp16", "speedup")
        print([(row["variant"], row.get("us_p50", row), row.get("speedup")) for row in case], file=sys.stderr)
        rows += case
    return rows


def layer_work(config: ModelConfig, tokens: int, num_keys: int, variant: str) -> Work:
    """Bytes of a layer's weights, keys and values, and operations of its Linears; activations are left out."""
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    hidden, inner = config.hidden_size, config.intermediate_size
    weights = (q + 2 * kv) * hidden + hidden * q + 3 * hidden * inner
    is_int8 = variant != "fp16"
    key_bytes = kv + 4 * config.num_kv_heads if variant == INT8_KV else 2 * kv
    weight_bytes = weights if is_int8 else 2 * weights
    return Work(weight_bytes + 2 * num_keys * key_bytes, 2.0 * tokens * weights, is_int8)


def _layers(config: ModelConfig, variant: str, device: torch.device) -> list[Layer]:
    """Layers on a device; drawn where the angles are, so the same on any."""
    scheme = PRESETS["w8a8" if variant == INT8_KV else variant]
    weights = Moved(RandomWeights(scheme, config, torch.float16, config.rope.device), device)
    return [Layer(config, weights, index) for index in range(NUM_LAYERS)]


def _calls(config: ModelConfig, variant: str, layers: Sequence[Layer], step: Rows) -> list[Call]:
    """One call per layer; each feeds itself, since a graph's order is what matters and not its values."""
    T, device = len(step.positions), config.rope.device
    is_checked = T <= MAX_CHECKED_TOKENS and variant != "fp16" and device.type == "cuda"
    on_cpu = _layers(config, variant, torch.device("cpu")) if is_checked else [None] * len(layers)
    num_blocks = int(step.block_tables.max()) + 1
    shape = (num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_size)
    calls: list[Call] = []
    for layer, there in zip(layers, on_cpu, strict=True):
        x, residual = (torch.randn(T, config.hidden_size, device=device, dtype=torch.float16) for _ in range(2))
        cache = KVCache(*(_random_keys(shape, device, variant == INT8_KV) for _ in range(2)))
        _check(layer, there, x, residual, step, config.rope, cache)
        calls.append(partial(layer, x, residual, step, config.rope, cache))
    return calls


def _random_keys(shape: tuple[int, ...], device: torch.device, is_int8: bool) -> Any:
    """Keys or values, normal: floats, or codes with a scale per token and head."""
    keys = torch.randn(shape, device=device, dtype=torch.float16)
    if not is_int8:
        return keys
    codes, scale = kernels.quantize_rows(keys.view(-1, shape[-1]))
    return Quantized(codes.view(shape), scale.view(shape[:-1]))


def _on_cpu_too(keys: Tensor | Quantized) -> Any:
    return Quantized(keys.codes.cpu(), keys.scale.cpu()) if isinstance(keys, Quantized) else keys.cpu()


def _check(
    layer: Layer, on_cpu: Layer | None, x: Tensor, residual: Tensor, step: Rows, rope: Tensor, cache: KVCache
) -> None:
    """Compare a layer with the same one in plain torch on the CPU, if it is given: W8A8, for few tokens.

    Of the baseline, which is torch's own but for attention, and of large steps: that it is finite and repeats its bits.

    Raises:
        WrongResult: it differs.
    """
    y, h = layer(x, residual, step, rope, cache)
    again, _ = layer(x, residual, step, rope, cache)
    expect(y.isfinite().all() and torch.equal(y, again), "the layer's output is not finite, or changes")
    if on_cpu is None:
        return
    there = Rows(
        positions=step.positions.cpu(),
        slots=step.slots.cpu(),
        query_starts=step.query_starts.cpu(),
        context_lens=step.context_lens.cpu(),
        block_tables=step.block_tables.cpu(),
        is_decode=step.is_decode,
    )
    want, want_h = on_cpu(
        x.cpu(), residual.cpu(), there, rope.cpu(), KVCache(_on_cpu_too(cache.k), _on_cpu_too(cache.v))
    )
    for got, wanted in ((y, want), (h, want_h)):
        error = ((got.cpu().float() - wanted.float()).norm() / wanted.float().norm()).item()
        expect(error <= MAX_ERROR, f"the layer is off by {error:.3g} of its norm")


def _decode_rows(config: ModelConfig, tokens: int, context: int) -> Rows:
    """One new token of each of T requests, whose blocks lie one after the other."""
    device = config.rope.device
    num_blocks = -(-context // BLOCK_SIZE)
    requests = torch.arange(tokens, dtype=torch.int32, device=device)
    tables = torch.zeros(tokens, config.max_model_len // BLOCK_SIZE, dtype=torch.int32, device=device)
    tables[:, :num_blocks] = requests[:, None] * num_blocks + torch.arange(num_blocks, device=device)
    return Rows(
        positions=torch.full_like(requests, context - 1),
        slots=requests * num_blocks * BLOCK_SIZE + context - 1,
        query_starts=torch.arange(tokens + 1, dtype=torch.int32, device=device),
        context_lens=torch.full_like(requests, context),
        block_tables=tables,
        is_decode=True,
        arrivals=torch.zeros(tokens, config.num_kv_heads, dtype=torch.int32, device=device),
        is_alone=True,
    )


def _prefill_rows(config: ModelConfig, tokens: int) -> Rows:
    """All tokens of one request."""
    positions = torch.arange(tokens, dtype=torch.int32, device=config.rope.device)
    return Rows(
        positions=positions,
        slots=positions,
        query_starts=torch.tensor([0, tokens], dtype=torch.int32, device=positions.device),
        context_lens=torch.tensor([tokens], dtype=torch.int32, device=positions.device),
        block_tables=positions[: -(-tokens // BLOCK_SIZE)][None],
        is_decode=False,
    )
