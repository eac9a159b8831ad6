"""Which tokens the running requests hold, kept on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.device.staging import Staging
from service.engine.request import Request
from service.engine.scheduler import Chunk


class TokenCounts:
    """For the penalized requests: how often each token is in the output, or whether it is in the text at all.

    Memory is taken at the first use, per token of the vocabulary and row: 4 bytes for a count, 1 where only is_seen
    counts, that is whether a token is in the prompt or the output.
    """

    def __init__(self, max_requests: int, vocab_size: int, device: torch.device, *, is_seen: bool = False) -> None:
        self._shape = max_requests, vocab_size
        self._device = device
        self._is_seen = is_seen
        self._dtype = torch.bool if is_seen else torch.int32
        self._staging = Staging(device)
        self._counts: Tensor | None = None
        # A bool of the host's would be sent by each step that writes it, and the host would wait.
        self._true = torch.ones((), dtype=torch.bool, device=device)
        self._owners: list[tuple[int, int]] = [(0, 0)] * max_requests

    def of(self, chunks: Sequence[Chunk], rows: Tensor) -> Tensor:
        """[S, V] int32, or bool for is_seen, before the tokens of this step; anything for a request without penalty.

        A request new to its row is copied in. The host has read all its tokens by then: one that is penalized is so in
        every step that samples for it, and after a preemption it starts once they have been read.

        rows: [S], the row of each chunk's request.
        """
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        requests = [chunk.request for chunk in chunks]
        new = [r for r in requests if self._is_penalized(r) and self._owners[r.row] != _owner(r)]
        if new:
            self._copy_in(self._counts, new)
        return self._counts[rows]

    def add(self, rows: Tensor, ids: Tensor) -> None:
        """Count the tokens that a step has sampled, one per row."""
        assert self._counts is not None
        if self._is_seen:
            self._counts.index_put_((rows, ids), self._true)
        else:
            self._counts[rows, ids] += 1

    def _is_penalized(self, request: Request) -> bool:
        params = request.params
        if self._is_seen:
            return params.repetition_penalty != 1
        return bool(params.presence_penalty or params.frequency_penalty)

    def _copy_in(self, counts: Tensor, requests: Sequence[Request]) -> None:
        """Count what these requests hold already; output only after a preemption."""
        places: list[int] = []
        for request in requests:
            self._owners[request.row] = _owner(request)
            counts[request.row].zero_()
            prompt_ids = request.prompt_ids[request.num_added :] if self._is_seen else []
            held = prompt_ids + request.output_ids
            places += [request.row * self._shape[1] + token_id for token_id in held]
        if not places:
            return
        taken = self._staging.take(8 * len(places))
        taken.view(torch.int64).numpy()[:] = places
        sent = self._staging.send(taken).view(torch.int64)
        if self._is_seen:
            counts.view(-1).index_fill_(0, sent, True)
        else:
            counts.view(-1).scatter_add_(0, sent, torch.ones_like(sent, dtype=torch.int32))


def _owner(request: Request) -> tuple[int, int]:
    return request.serial, request.num_preemptions
