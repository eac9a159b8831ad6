"""One rank that computes what several do: the sums of their parts, each with its own scales of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import Quantized
from service.models.decoder import Decoder, score
from service.models.mlp import GatedMLP


class Summed:
    """The sum over ranks of what their parts make of one input, split where the parts read columns of it."""

    input_format = None

    def __init__(self, parts: list[Any], *, splits: bool) -> None:
        self.parts = parts
        self.splits = splits

    def __call__(self, x: Any, residual: Tensor | None = None) -> Tensor:
        inputs = [x] * len(self.parts)
        if self.splits:
            inputs = [each.contiguous() for each in x.chunk(len(self.parts), 1)]
        first, *others = (part(each) for part, each in zip(self.parts, inputs, strict=True))
        total: Tensor = first if residual is None else first + residual
        for other in others:
            total = total + other
        return total


def group_activations(whole: Decoder, decoders: Sequence[Decoder], dtype: torch.dtype) -> None:
    """Give one rank's o and down the scales of ranks: groups of K / size inputs.

    Below float32 the MLPs are summed as a whole: on one rank gate and up would be rounded before the codes.
    """
    for index, layer in enumerate(whole.layers):
        parts = [decoder.layers[index] for decoder in decoders]
        layer.attention.o = Summed([part.attention.o for part in parts], splits=True)  # type: ignore[assignment]
        if dtype != torch.float32:
            layer.mlp = Summed([part.mlp for part in parts], splits=False)  # type: ignore[assignment]
            continue
        assert isinstance(layer.mlp, GatedMLP)
        layer.mlp.gated.output_format = None
        downs = [part.mlp.down for part in parts]  # type: ignore[union-attr]
        layer.mlp.down = Summed(downs, splits=True)  # type: ignore[assignment]


def hidden_of(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """The hidden states of a text, before the head."""
    found: list[Tensor] = []
    head = decoder.head

    def noted(x: Tensor | Quantized, residual: Tensor | None = None) -> Tensor:
        assert isinstance(x, Tensor)
        found.append(x)
        return head(x, residual)

    decoder.head = noted  # type: ignore[assignment]
    with torch.inference_mode():
        score(decoder, token_ids)
    decoder.head = head
    return found[0]
