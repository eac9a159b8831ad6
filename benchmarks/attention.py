"""Paged attention of one model's layer: prefill beside torch's flash attention, decode beside the copy rate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from benchmarks.timing import Call, Roofs, Work, add_ratios, expect, measure, num_copies, result_row
from kernels import Quantized, quantize_rows
from service.models.config import ModelConfig

BLOCK_SIZE = 64
CHECKED_QUERIES = 8
FP16_ERROR = 2.0**-9
"""Of the probability-weighted sum of |v|: p and y are rounded to float16, 2^-11 each, the scores' sums are float32."""


@dataclass(frozen=True, slots=True)
class Scene:
    """batch requests of one context each; queries is 1 for a decode step and the context for a prefill."""

    config: ModelConfig
    batch: int
    context: int
    queries: int
    device: torch.device

    @property
    def num_blocks(self) -> int:
        """Blocks of one request."""
        return -(-self.context // BLOCK_SIZE)

    @property
    def query_starts(self) -> Tensor:
        return torch.arange(self.batch + 1, dtype=torch.int32, device=self.device) * self.queries

    @property
    def context_lens(self) -> Tensor:
        return torch.full((self.batch,), self.context, dtype=torch.int32, device=self.device)

    def tables(self, copies: int) -> list[Tensor]:
        """Block tables of each copy, over blocks of its own in a shuffled order; as wide as the model's context."""
        width = max(self.num_blocks, self.config.max_model_len // BLOCK_SIZE)
        order = torch.randperm(copies * self.batch * self.num_blocks, device=self.device).int()
        tables = torch.zeros(copies, self.batch, width, dtype=torch.int32, device=self.device)
        tables[:, :, : self.num_blocks] = order.view(copies, self.batch, self.num_blocks)
        return list(tables)

    def work(self, cache_bytes: float) -> Work:
        """Keys, values, queries and outputs once; two products over the keys that each query sees."""
        H, D = self.config.num_heads, self.config.head_size
        seen = self.context - (self.queries - 1) / 2
        operations = 4.0 * H * D * self.batch * self.queries * seen
        return Work(cache_bytes + 4 * self.batch * self.queries * H * D, operations)

    def cache_bytes(self, value_bytes: float) -> float:
        """Of the keys and values of all requests."""
        return 2 * self.batch * self.context * self.config.num_kv_heads * self.config.head_size * value_bytes


def attention_rows(
    shape: str,
    config: ModelConfig,
    prefills: Iterable[tuple[int, int]],
    decodes: Iterable[tuple[int, int]],
    roofs: Roofs,
) -> list[dict[str, Any]]:
    """prefills, decodes: (requests, context)."""
    device = config.rope.device
    scenes = [("prefill", Scene(config, batch, context, context, device)) for batch, context in prefills]
    scenes += [("decode", Scene(config, batch, context, 1, device)) for batch, context in decodes]
    rows = []
    for what, scene in scenes:
        rows += _scene_rows(what, scene, roofs, {"what": "attention", "shape": shape})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _scene_rows(what: str, scene: Scene, roofs: Roofs, head: dict[str, Any]) -> list[dict[str, Any]]:
    # int8 keys and values carry one float32 scale per slot and key head.
    int8_bytes = 1 + 4 / scene.config.head_size
    work = {"fp16 kv": scene.work(scene.cache_bytes(2)), "int8 kv": scene.work(scene.cache_bytes(int8_bytes))}
    contenders: dict[str, Callable[[], Sequence[Call]]] = {
        "fp16 kv": partial(paged_calls, scene, False),
        "int8 kv": partial(paged_calls, scene, True),
    }
    if what == "prefill":
        contenders["sdpa flash"], work["sdpa flash"] = partial(_flash, scene), work["fp16 kv"]
    rows = []
    for variant, measured in measure(contenders, roofs.floor_s(work["int8 kv"])).items():
        row = head | {"op": what, "batch": scene.batch, "context": scene.context, "variant": variant}
        rows.append(result_row(row, measured, work[variant], roofs))
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, file=sys.stderr, flush=True)
    add_ratios(rows, "fp16 kv", "speedup")
    return rows


def paged_calls(scene: Scene, is_int8: bool) -> list[Call]:
    config = scene.config
    H, G, D = config.num_heads, config.num_kv_heads, config.head_size
    copies = num_copies(scene.cache_bytes(1 if is_int8 else 2)) if scene.queries == 1 else 2
    slots = copies * scene.batch * scene.num_blocks * BLOCK_SIZE
    k, v = (_cache(slots, G, D, is_int8, scene.device) for _ in range(2))
    tables = scene.tables(copies)
    q = torch.randn(scene.batch * scene.queries, H, D, device=scene.device, dtype=torch.float16)
    rest = scene.query_starts, scene.context_lens, scene.queries == 1, D**-0.5
    # int8 caches come as the same pair that passes between all ops.
    attend: Any = kernels.paged_attention
    y = attend(q, k, v, tables[0], *rest)
    check_attention(y, q, k, v, tables[0], scene)
    return [partial(attend, q, k, v, table, *rest) for table in tables]


def _cache(slots: int, G: int, D: int, is_int8: bool, device: torch.device) -> Tensor | Quantized:
    """Random keys or values: [num_blocks, block_size, G, D] float16, or codes of that shape and a scale per head."""
    cache = torch.randn(slots * G, D, device=device, dtype=torch.float16)
    if not is_int8:
        return cache.view(-1, BLOCK_SIZE, G, D)
    codes, scale = quantize_rows(cache)
    return Quantized(codes.view(-1, BLOCK_SIZE, G, D), scale.view(-1, BLOCK_SIZE, G))


def _flash(scene: Scene) -> list[Call]:
    """torch's flash attention, causal, over keys and values of as many heads as queries: the same operations."""
    H, D = scene.config.num_heads, scene.config.head_size
    size = (scene.batch, H, scene.context, D)
    q, k, v = (torch.randn(size, device=scene.device, dtype=torch.float16) for _ in range(3))
    return [partial(_flash_once, q, k, v)] * 2


def _flash_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def check_attention(
    y: Tensor, q: Tensor, k: Tensor | Quantized, v: Tensor | Quantized, table: Tensor, scene: Scene
) -> None:
    """Compare a few queries of the first and the last request with attention in float64.

    Raises:
        WrongResult: an output is further away than the roundings allow.
    """
    D = q.shape[-1]
    if isinstance(k, Quantized) and scene.queries == 1:
        # A decode multiplies codes of queries; a prompt's are rounded before they come here.
        codes, scale = quantize_rows(q.flatten(0, 1))
        q = (codes.double() * scale.double()[:, None]).view(q.shape)
    for request in {0, scene.batch - 1}:
        blocks = table[request, : scene.num_blocks].long()
        keys, values = (_gathered(cache, blocks)[: scene.context] for cache in (k, v))
        for i in {j * (scene.queries - 1) // (CHECKED_QUERIES - 1) for j in range(CHECKED_QUERIES)}:
            row, seen = request * scene.queries + i, scene.context - scene.queries + i + 1
            group = q[row].double().view(keys.shape[1], -1, D)
            p = torch.einsum("ghd,sgd->ghs", group, keys[:seen]).mul(D**-0.5).softmax(-1)
            want, reach = (torch.einsum("ghs,sgd->ghd", p, x[:seen]) for x in (values, values.abs()))
            error = (y[row].double().view_as(want) - want).abs()
            expect((error <= FP16_ERROR * reach + 2.0**-14).all(), f"request {request}, query {i} differs")


def _gathered(cache: Tensor | Quantized, blocks: Tensor) -> Tensor:
    """The slots of these blocks in order: [num_slots, G, D] float64."""
    if isinstance(cache, Quantized):
        return (cache.codes[blocks].double() * cache.scale[blocks].double()[..., None]).flatten(0, 1)
    return cache[blocks].double().flatten(0, 1)
