"""What a step's requests add to the logits of single tokens, as a list on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.api import SamplingParams
from service.engine.device.staging import Staging
from service.engine.scheduler import Chunk

ENTRY_BYTES = 12
"""Bytes of an entry on the device: its place in 64 bits and its value in 32."""


@dataclass(frozen=True, slots=True)
class TokenBias:
    """E values to add to the logits of S sampling rows.

    places: [E] int64, row * vocab_size + token id.   values: [E] float32.
    """

    places: Tensor
    values: Tensor

    @classmethod
    def build(cls, chunks: Sequence[Chunk], vocab_size: int, staging: Staging) -> TokenBias | None:
        """Collect the biases of the chunks that sample, and launch their copy; None if there are none."""
        entries = [
            (row * vocab_size + token, value)
            for row, chunk in enumerate(chunks)
            for token, value in biases(chunk.request.params, chunk.index)
        ]
        if not entries:
            return None
        taken = staging.take(len(entries) * ENTRY_BYTES)
        places, values = _split(taken, len(entries))
        places.numpy()[:], values.numpy()[:] = zip(*entries, strict=True)
        return cls(*_split(staging.send(taken), len(entries)))

    def apply(self, logits: Tensor) -> Tensor:
        """Add the values; all other logits keep their exact bits."""
        return logits.flatten().scatter_add(0, self.places, self.values).view_as(logits)


def has_biases(params: SamplingParams, index: int) -> bool:
    """Whether `biases` yields any."""
    return bool(params.logit_bias) or index < params.min_tokens


def biases(params: SamplingParams, index: int) -> list[tuple[int, float]]:
    """(token, value) for the index-th token of an answer: what the client asks for, and -inf for early ends."""
    held = ((token, -math.inf) for token in params.held_ids if index < params.min_tokens)
    return [*params.logit_bias, *held]


def _split(table: Tensor, num_entries: int) -> tuple[Tensor, Tensor]:
    """Split uint8 into int64 [num_entries] and float32 [num_entries]."""
    places, values = table.tensor_split([8 * num_entries])
    return places.view(torch.int64), values.view(torch.float32)
