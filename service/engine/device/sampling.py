"""How each row of a step is sampled, as tensors."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.device.token_mask import TokenMask
from service.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each of S rows is sampled, on the device. float32 [S] unless said.

    uniform: in [0, 1), drawn from the request's seed and the index of the token, so that a request's randomness does
        not depend on its neighbours, on chunking or on preemption.
    top_k: int64 [S], 0 for off.   num_top_logprobs: None where no row wants log-probabilities.
    constraint: None where no row has a grammar.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    uniform: Tensor
    is_random: bool
    is_filtered: bool
    is_penalized: bool
    num_top_logprobs: int | None
    constraint: TokenMask | None

    @classmethod
    def build(cls, chunks: Sequence[Chunk], device: torch.device) -> SamplingBatch:
        """Collect the parameters of the chunks that sample."""
        params = [chunk.request.params for chunk in chunks]
        is_random = any(p.temperature > 0 for p in params)
        columns = [
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.repetition_penalty for p in params],
            [uniform(c.request.seed, c.index) if c.request.params.temperature > 0 else 0.0 for c in chunks],
        ]
        table = torch.tensor(columns, dtype=torch.float64)
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        return cls(
            temperature=table[0].float(),
            top_k=table[1].long(),
            top_p=table[2].float(),
            min_p=table[3].float(),
            repetition_penalty=table[4].float(),
            uniform=table[5],
            is_random=is_random,
            is_filtered=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params if p.temperature > 0),
            is_penalized=any(p.repetition_penalty != 1 for p in params),
            num_top_logprobs=max(wanted) if wanted else None,
            constraint=TokenMask.build(chunks, device),
        )


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing but the request's seed and the token's index."""
    digest = hashlib.blake2b(struct.pack("<Qq", seed & (2**64 - 1), index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
