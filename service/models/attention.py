"""Attention over the paged cache: QKV projection, rotation, attention and output projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels import Quantized, Rows
from quant.errors import CheckpointError
from quant.fused import fuse, take_rows
from quant.part import taken
from service.models.config import ModelConfig
from service.models.sharding import ALONE, Ranks, columns, span
from service.models.sharding import rows as rows_of
from service.models.weights import Linear, Weights, norm_weight


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of one layer.

    Each is [num_blocks, block_size, G, D] float, or codes of that shape with scales [num_blocks, block_size, G].
    """

    k: Tensor | Quantized
    v: Tensor | Quantized

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    @property
    def num_heads(self) -> int:
        """G."""
        return (self.k.codes if isinstance(self.k, Quantized) else self.k).shape[2]


class Attention:
    """o(softmax(q k^T) v) of one layer, with its rotation, head norms, window and soft cap."""

    def __init__(
        self, config: ModelConfig, weights: Weights, index: int, ranks: Ranks = ALONE, sink: Tensor | None = None
    ) -> None:
        names, head_size = config.layout.names, config.head_size
        self.num_heads = len(span(config.num_heads, ranks))
        self.scale = config.scale
        self.window = config.windows[index]
        self.soft_cap = config.soft_cap
        self.eps = config.norm_eps
        self.qkv = _qkv(config, weights, index, ranks)
        self.sink = None if sink is None else _sink(config, sink, ranks)
        self.o = weights.linear(
            f"{names.layer(index)}.{names.o}",
            config.hidden_size,
            config.num_heads * head_size,
            config.o_bias,
            is_transposed=config.layout.is_transposed,
            part=columns(ranks, config.num_heads, head_size),
        )
        self.q_weight: Tensor | None = None
        self.k_weight: Tensor | None = None
        if names.head_norms is not None:
            self.q_weight, self.k_weight = (
                norm_weight(config, weights, f"{names.layer(index)}.{norm}", head_size) for norm in names.head_norms
            )

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.o

    def __call__(
        self, y: Tensor | Quantized, rows: Rows, cos_sin: Tensor, cache: KVCache, residual: Tensor | None = None
    ) -> Tensor:
        """Returns the rank's sum [T, hidden_size], with the residual added if given. Writes to the cache."""
        attended = kernels.rotary_attention(
            self.qkv(y),
            rows,
            cos_sin,
            cache.k,
            cache.v,
            self.num_heads,
            self.scale,
            self.o.input_format,
            self.window,
            self.soft_cap,
            self.q_weight,
            self.k_weight,
            self.eps,
            self.sink,
        )
        return self.o(attended, residual)


def _qkv(config: ModelConfig, weights: Weights, index: int, ranks: Ranks) -> Linear:
    """Load one Linear whose rows are all queries, then all keys, then all values, head by head."""
    family = config.layout
    heads, unit = _stored_heads(config)
    groups = [[num] for num in heads] if len(family.names.qkv) > 1 else [heads]
    layer = family.names.layer(index)
    qkv = fuse(
        [
            weights.linear(
                f"{layer}.{name}",
                sum(group) * unit,
                config.hidden_size,
                config.qkv_bias,
                is_transposed=family.is_transposed,
                part=rows_of(ranks, *group, unit=unit),
            )
            for name, group in zip(family.names.qkv, groups, strict=True)
        ]
    )
    order = _order(config, qkv.shape[0])
    return qkv if order is None else take_rows(qkv, order)


def _sink(config: ModelConfig, stored: Tensor, ranks: Ranks) -> Tensor:
    """The rank's queries, keys and values of the sink, from those of the checkpoint [S, (H + 2G) D]."""
    heads, unit = _stored_heads(config)
    if stored.shape[1] != sum(heads) * unit:
        raise CheckpointError(
            f"the sink has {stored.shape[1]} numbers a token and layer, and the model {sum(heads) * unit}: they do not "
            "belong together; quantize the float model again"
        )
    mine = taken(stored.T, rows_of(ranks, *heads, unit=unit)).T
    order = _order(config, mine.shape[1])
    return (mine if order is None else mine[:, order.to(mine.device)]).contiguous()


def _stored_heads(config: ModelConfig) -> tuple[list[int], int]:
    """How queries, keys and values stand in the checkpoint: numbers of units that lie together, and the unit's rows."""
    if config.layout.has_head_major_qkv:
        # The three of one head stand together, and there are as many key heads as heads.
        return [config.num_heads], 3 * config.head_size
    return [config.num_heads, config.num_kv_heads, config.num_kv_heads], config.head_size


def _order(config: ModelConfig, num_rows: int) -> Tensor | None:
    """Which of the checkpoint's rows to take for all queries, then all keys, then all values; None for all in order."""
    if not config.layout.has_head_major_qkv:
        return None
    return torch.arange(num_rows).view(-1, 3, config.head_size).transpose(0, 1).flatten()
