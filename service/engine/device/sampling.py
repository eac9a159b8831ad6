"""The sampling parameters of a step's rows, as tensors."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from service.engine.device.staging import Staging
from service.engine.device.token_bias import TokenBias, has_biases
from service.engine.device.token_mask import TokenMask
from service.engine.scheduler import Chunk

NUM_SINGLES = 6
ROW_BYTES = 16 + 4 * NUM_SINGLES
"""Bytes of a row's parameters on the device: two numbers of 64 bits, the others of 32."""

LARGEST_TOP_K = 2**62


@dataclass(frozen=True, slots=True)
class RowParams:
    """The parameters of S sampling rows, on the device. float32 [S] unless noted.

    top_k: int64, 0 for off.
    uniform: float64 in [0, 1), drawn from the request's seed and the index of the token, so that a request's randomness
        does not depend on other requests, on chunking or on preemption.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    uniform: Tensor

    def rows(self, part: slice) -> RowParams:
        """Those of some rows."""
        return RowParams(*(getattr(self, field.name)[part] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of S rows.

    params: None if no row is random or penalized.
    is_penalized: whether a row has a repetition penalty.
    counts_tokens: whether a row has a presence or a frequency penalty.
    bias: None if no row adds to logits.
    num_top_logprobs: None if no row wants log-probabilities.
    constraint: None if no row has a grammar.
    """

    params: RowParams | None
    is_random: bool
    is_filtered: bool
    is_penalized: bool
    counts_tokens: bool
    num_top_logprobs: int | None
    constraint: TokenMask | None
    bias: TokenBias | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether every row takes its likeliest token, and nothing but the token is asked for."""
        return (self.params, self.num_top_logprobs, self.constraint, self.bias) == (None,) * 4


class SamplingBuilder:
    """Collects the sampling parameters of steps of at most max_requests rows of vocab_size logits."""

    def __init__(self, max_requests: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._table = Staging(device, max_requests * ROW_BYTES)
        # Grows with the first grammar: most engines see none, and a row takes 16 KiB.
        self._mask = Staging(device)
        self._bias = Staging(device)

    def build(self, chunks: Sequence[Chunk]) -> SamplingBatch:
        """The parameters of the chunks that sample. If all rows are greedy, nothing is copied to the device."""
        is_random = is_filtered = is_penalized = counts_tokens = is_constrained = is_biased = False
        num_top_logprobs = -1
        for chunk in chunks:
            request = chunk.request
            p = request.params
            if p.temperature > 0:
                is_random = True
                is_filtered = is_filtered or p.top_k > 0 or p.top_p < 1 or p.min_p > 0
            if p.repetition_penalty != 1:
                is_penalized = True
            if p.presence_penalty or p.frequency_penalty:
                counts_tokens = True
            if has_biases(p, chunk.index):
                is_biased = True
            if p.logprobs is not None:
                num_top_logprobs = max(num_top_logprobs, p.logprobs)
            if request.matcher is not None:
                is_constrained = True
        return SamplingBatch(
            params=self._params(chunks) if is_random or is_penalized or counts_tokens else None,
            is_random=is_random,
            is_filtered=is_filtered,
            is_penalized=is_penalized,
            counts_tokens=counts_tokens,
            num_top_logprobs=None if num_top_logprobs < 0 else num_top_logprobs,
            constraint=TokenMask.build(chunks, self._mask) if is_constrained else None,
            bias=TokenBias.build(chunks, self._vocab_size, self._bias) if is_biased else None,
        )

    def _params(self, chunks: Sequence[Chunk]) -> RowParams:
        # One copy of all parameters, each in its own type: casting them on the device would cost a kernel each.
        params, size = [chunk.request.params for chunk in chunks], len(chunks)
        taken = self._table.take(size * ROW_BYTES)
        uniforms, top_k, singles = _columns(taken, size)
        uniforms.numpy()[:] = [
            uniform(c.request.seed, c.index) if c.request.params.temperature > 0 else 0 for c in chunks
        ]
        # A client may send any integer; all above the vocabulary size are equivalent, but must fit int64.
        top_k.numpy()[:] = [min(p.top_k, LARGEST_TOP_K) for p in params]
        singles.numpy()[:] = [
            [p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.repetition_penalty for p in params],
            [p.presence_penalty for p in params],
            [p.frequency_penalty for p in params],
        ]
        uniforms, top_k, singles = _columns(self._table.send(taken), size)
        temperature, top_p, min_p, repetition, presence, frequency = singles.unbind()
        return RowParams(temperature, top_k, top_p, min_p, repetition, presence, frequency, uniforms)


def _columns(table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [ROW_BYTES * S] uint8 into float64 [S], int64 [S], float32 [NUM_SINGLES, S]."""
    uniforms, top_k, singles = table.tensor_split([8 * size, 16 * size])
    return uniforms.view(torch.float64), top_k.view(torch.int64), singles.view(torch.float32).view(NUM_SINGLES, size)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends only on the request's seed and the token's index."""
    digest = hashlib.blake2b(struct.pack("<Qq", seed & (2**64 - 1), index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
