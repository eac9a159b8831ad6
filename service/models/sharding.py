"""Tensor parallelism: which part of a decoder a rank holds, and how the ranks' results are joined.

Queries, keys, values, gate and up are split by rows, so that a rank has whole heads and whole columns of the MLP; o and
down by the columns that read those. So a layer has two sums over the ranks, of its branches' outputs, each of which the
next norm takes. An int8 Linear rounds what it reads with the scales of the rank's own part of K: scales per token and
group of K / size inputs. A static scale is the same on all ranks. Embedding and head are split by tokens of the
vocabulary: for the likeliest token only the ranks' largest logits meet, and all of them where a token is drawn.

Source: Megatron-LM (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kernels import Quantized
from quant.part import WHOLE, Part
from service.errors import UnsupportedModel
from service.models.config import ModelConfig
from service.models.weights import Norm


class Ranks(Protocol):
    """One of size processes that compute one decoder, seen from inside. All call the same methods in the same order."""

    rank: int
    size: int

    def reserve(self, max_rows: int, width: int, dtype: torch.dtype) -> None:
        """Make ready for `all_reduce_norm` of up to max_rows rows [T, width], before any is called."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, which may be written to."""
        ...

    def all_reduce_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor | Quantized, Tensor]:
        """norm of the sum of all ranks' x, and the residual stream with it.

        The residual is what the call before has returned, or None or the same on all ranks: how a rank keeps it, whole
        or a part of its rows, is its own affair. What is returned first is valid until the next call.
        """
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' x of one shape, [size, *shape], on every rank."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's x, which is written into the others'."""
        ...


class Alone:
    """One process that computes all of a decoder."""

    rank = 0
    size = 1

    def reserve(self, max_rows: int, width: int, dtype: torch.dtype) -> None:
        """See `Ranks`."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        return x

    def all_reduce_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor | Quantized, Tensor]:
        """See `Ranks`."""
        return norm(x, residual)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        return x[None]

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        return x


ALONE = Alone()


def refuse_uneven(config: ModelConfig, size: int) -> None:
    """Raise UnsupportedModel if a model's heads or columns cannot be divided evenly among ranks."""
    experts = config.experts
    widths = {
        "heads": config.num_heads,
        "key and value heads": config.num_kv_heads,
        "columns of the MLP": config.intermediate_size,
        "columns of each expert": config.intermediate_size if experts is None else experts.intermediate_size,
    }
    for what, count in widths.items():
        if count % size:
            fitting = [n for n in range(1, size) if all(other % n == 0 for other in widths.values())]
            raise UnsupportedModel(
                f"tensor_parallel {size} does not divide the {count} {what} of this {config.family} model; "
                f"set it to {fitting[-1]}"
            )


def span(count: int, ranks: Ranks) -> range:
    """The rank's share of count things, in order; the last ranks have fewer if it cannot be even."""
    each = -(-count // ranks.size)
    return range(min(count, ranks.rank * each), min(count, (ranks.rank + 1) * each))


def rows(ranks: Ranks, *counts: int, unit: int = 1) -> Part:
    """The rank's rows of a weight that holds several matrices, one below the other, of counts[i] x unit rows."""
    if ranks.size == 1:
        return WHOLE
    found, before = [], 0
    for count in counts:
        mine = span(count, ranks)
        found.append(range(before + mine.start * unit, before + mine.stop * unit))
        before += count * unit
    return Part(rows=tuple(found))


def columns(ranks: Ranks, count: int, unit: int = 1) -> Part:
    """The rank's columns of a weight of count x unit columns. The first rank adds the bias."""
    if ranks.size == 1:
        return WHOLE
    mine = span(count, ranks)
    return Part(columns=(range(mine.start * unit, mine.stop * unit),), adds=ranks.rank == 0)
