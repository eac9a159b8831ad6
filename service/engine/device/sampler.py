"""Samples token ids from logits, with one uniform number per row.

In this order: penalties, bias, grammar, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from service.engine.device.sampling import RowParams, SamplingBatch
from service.models.sharding import ALONE, Ranks

SLICE_LOGITS = 2**23
"""Most logits drawn from at once: 335 MB on the way, for any number of rows."""


class Fault(IntEnum):
    """Why the sampled id of a row is invalid."""

    NONE = 0
    NOT_FINITE = 1
    """The model's logits contain NaN or plus infinity, or are all minus infinity."""
    NONE_ALLOWED = 2
    """The grammar allows no token, or only tokens of probability 0."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The sampled tokens of S rows.

    ids: [S] int64.   faults: [S] int64, a `Fault` each.
    logprobs, top_ids, top_logprobs: if requested, of the sampled ids [S] and of the n likeliest [S, n].
    """

    ids: Tensor
    faults: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def to_host(self) -> Choice:
        """Launch the copy to the host, and return the tensors there."""
        tensors = (self.ids, self.faults, self.logprobs, self.top_ids, self.top_logprobs)
        return Choice(*(None if t is None else t.to("cpu", non_blocking=True) for t in tensors))  # type: ignore[arg-type]


def sample(logits: Tensor, batch: SamplingBatch, seen: Tensor | None, counts: Tensor | None = None) -> Choice:
    """Choose one token per row.

    Log-probabilities are the model's own, before penalties, bias, grammar, temperature and filters.

    Args:
        logits: [S, V] float32.
        batch: the sampling parameters of each row.
        seen: [S, V] bool, the tokens of each row's prompt and output; required if a row is penalized.
        counts: [S, V] int32, how often each token is in the row's output; required if the batch counts tokens.
    """
    if batch.is_greedy:
        return greedy(logits)
    chosen = logits
    if batch.is_penalized:
        assert batch.params is not None
        chosen = penalize(logits, seen, batch.params.repetition_penalty)
    if batch.counts_tokens:
        assert batch.params is not None
        chosen = discourage(chosen, counts, batch.params)
    if batch.bias is not None:
        chosen = batch.bias.apply(chosen)
    faults = _faults(logits.amax(-1))
    if batch.constraint is not None:
        chosen = batch.constraint.apply(chosen)
        is_stuck = (faults == Fault.NONE) & (chosen.amax(-1) == float("-inf"))
        faults = torch.where(is_stuck, Fault.NONE_ALLOWED, faults)
    ids = chosen.argmax(-1)
    if batch.is_random:
        assert batch.params is not None
        drawn = _draw(chosen, batch.params, batch.is_filtered)
        ids = torch.where(batch.params.temperature > 0, drawn, ids)
    if batch.num_top_logprobs is None:
        return Choice(ids, faults)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(batch.num_top_logprobs, dim=-1)
    return Choice(ids, faults, logprobs.gather(-1, ids[:, None])[:, 0], top.indices, top.values)


def greedy(logits: Tensor, ranks: Ranks = ALONE) -> Choice:
    """Choose the likeliest token of each row of logits [S, V], the first of equal ones.

    ranks: those of which each has its part [S, W] of the logits and calls this; only their maxima meet.
    """
    ids, largest = logits.argmax(-1), logits.amax(-1)
    if ranks.size > 1:
        own = torch.stack((largest.view(torch.int32), ids.int() + ranks.rank * logits.shape[1]), -1)
        all_largest, all_ids = ranks.all_gather(own).unbind(-1)
        all_largest = all_largest.contiguous().view(torch.float32)
        ids = all_ids.gather(0, all_largest.argmax(0, keepdim=True))[0].long()
        largest = all_largest.amax(0)
    return Choice(ids, _faults(largest))


def _faults(largest: Tensor) -> Tensor:
    """Of rows by their largest logit, which is not finite if any is NaN or +inf; a tenth of the cost of testing all."""
    return torch.where(largest.isfinite(), Fault.NONE, Fault.NOT_FINITE)


def penalize(logits: Tensor, seen: Tensor | None, penalty: Tensor) -> Tensor:
    """Divide the positive and multiply the negative logits of tokens already seen by the penalty [S].

    Source: CTRL (arXiv 1909.05858), section 4.1, in the sign-aware form of transformers.
    """
    assert seen is not None
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def discourage(logits: Tensor, counts: Tensor | None, params: RowParams) -> Tensor:
    """logits - frequency_penalty * counts - presence_penalty * (counts > 0), for tokens that the output holds.

    Source: OpenAI's API reference, "Frequency and presence penalties".
    """
    assert counts is not None
    penalty = params.frequency_penalty[:, None] * counts + params.presence_penalty[:, None]
    return torch.where(counts > 0, logits - penalty, logits)


def _draw(logits: Tensor, params: RowParams, is_filtered: bool) -> Tensor:
    """Draw one id per row by inverting its cumulative distribution at its uniform number: [S] int64.

    A few rows at a time: with filters a logit takes 40 bytes on the way.
    """
    size = max(1, SLICE_LOGITS // logits.shape[-1])
    if len(logits) <= size:
        return _draw_slice(logits, params, is_filtered)
    parts = (slice(start, start + size) for start in range(0, len(logits), size))
    return torch.cat([_draw_slice(logits[part], params.rows(part), is_filtered) for part in parts])


def _draw_slice(logits: Tensor, params: RowParams, is_filtered: bool) -> Tensor:
    # Greedy rows are drawn with temperature 1; the caller discards the result.
    temperature = torch.where(params.temperature > 0, params.temperature, 1.0)
    probs = (logits / temperature[:, None]).softmax(-1)
    drawn = _invert(probs, params.uniform)
    if not is_filtered:
        return drawn
    probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    kept = ids.gather(-1, _invert(_filter(probs, params), params.uniform)[:, None])[:, 0]
    # A row without filters is drawn in vocabulary order, so that its draw does not depend on other rows' filters.
    has_filter = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    return torch.where(has_filter, kept, drawn)


def _filter(probs: Tensor, params: RowParams) -> Tensor:
    """Zero what top-k, then top-p of the rest, then min-p exclude. probs [S, V] descending; the first is kept."""
    rank = torch.arange(probs.shape[-1], device=probs.device)
    top_k = torch.where(params.top_k > 0, params.top_k, probs.shape[-1])
    probs = probs.masked_fill(rank >= top_k[:, None], 0.0)
    top_p = params.top_p[:, None]
    total = probs.sum(-1, keepdim=True)
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    probs = probs.masked_fill((before >= top_p * total) & (rank > 0) & (top_p < 1), 0.0)
    return probs.masked_fill(probs < params.min_p[:, None] * probs[:, :1], 0.0)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative probability exceeds uniform * total: [S] int64."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # uniform < 1 keeps the target below the total, but rounding could still reach it: then take the last one kept.
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)
