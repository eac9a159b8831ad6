"""The log-probabilities of prompt tokens, computed in the steps that prefill them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from service.engine.device.staging import Staging
from service.engine.messages import Logprob
from service.engine.request import Request
from service.engine.scheduler import Chunk
from service.models.decoder import Decoder

SLICE_LOGITS = 2**23
"""Most logits computed at once: 32 MiB of float32 for any number of rows and any vocabulary."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of R prompt tokens, in the order of the chunks that score them.

    logprobs: [R] float32, NaN where the model's logits are not finite.
    top_ids, top_logprobs: [R, n], the n likeliest tokens at each position.
    """

    chunks: Sequence[Chunk]
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def to_host(self) -> Scores:
        """Launch the copy to the host, and return the tensors there."""
        logprobs, ids, top = (t.to("cpu", non_blocking=True) for t in (self.logprobs, self.top_ids, self.top_logprobs))
        return replace(self, logprobs=logprobs, top_ids=ids, top_logprobs=top)

    def by_request(self) -> list[tuple[Request, list[Logprob]]]:
        """(request, log-probabilities of its prompt tokens in this step). The tensors must be on the host."""
        rows = zip(self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        found = []
        for chunk in self.chunks:
            wanted = chunk.request.params.prompt_logprobs
            found.append(
                (
                    chunk.request,
                    [
                        Logprob(logprob, list(zip(ids[:wanted], top[:wanted], strict=True)))
                        for logprob, ids, top in islice(rows, len(chunk.scored))
                    ],
                )
            )
        return found


def score_prompts(
    decoder: Decoder,
    hidden: Tensor,
    chunks: Sequence[Chunk],
    staging: Staging,
    tell: Callable[[Tensor], None] | None = None,
) -> Scores | None:
    """Score the prompt tokens of a step from its hidden states [T, hidden_size]; None if no request asks for it.

    tell: called with the rows that are scored, [R] int64 on the host, before their logits are computed.
    """
    scoring = [chunk for chunk in chunks if chunk.scored]
    if not scoring:
        return None
    num_top = max(chunk.request.params.prompt_logprobs or 0 for chunk in scoring)
    on_host = _rows_and_targets(chunks, staging)
    if tell is not None:
        tell(on_host.view(torch.int64).view(2, -1)[0])
    rows, targets = staging.send(on_host).view(torch.int64).view(2, -1)
    parts = logits_in_parts(decoder, hidden, rows)
    slices = [_score(logits, targets[part], num_top) for part, logits in parts]
    logprobs, top_ids, top_logprobs = (torch.cat(column) for column in zip(*slices, strict=True))
    return Scores(scoring, logprobs, top_ids, top_logprobs)


def _score(logits: Tensor, targets: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """From logits [R, V]: log softmax at targets [R], and ids and log softmax of the num_top likeliest, [R, n]."""
    total = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - total
    top = logits.topk(num_top, dim=-1)
    # With an infinite total every finite logit would become -inf, which is also a valid result; NaN is not.
    return logprobs.masked_fill(~total.isfinite(), math.nan), top.indices, top.values - total[:, None]


def logits_in_parts(decoder: Decoder, hidden: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The logits of rows [R] of hidden states, a few at a time, with which of the rows they are of."""
    size = max(1, SLICE_LOGITS // decoder.config.vocab_size)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield part, decoder.logits(hidden.index_select(0, rows[part]))


def _rows_and_targets(chunks: Sequence[Chunk], staging: Staging) -> Tensor:
    """The rows of the step that are scored, and the token that follows each in the prompt: [2, R] int64, as bytes."""
    taken = staging.take(16 * sum(len(chunk.scored) for chunk in chunks))
    rows, targets = taken.view(torch.int64).view(2, -1).numpy()
    start = place = 0
    for chunk in chunks:
        scored, end = chunk.scored, place + len(chunk.scored)
        if scored:
            first = start + scored.start - chunk.start
            rows[place:end] = np.arange(first, first + len(scored))
            targets[place:end] = chunk.request.prompt_ids[scored.start + 1 : scored.stop + 1]
        start, place = start + chunk.length, end
    return taken
