"""How often each token is in the output of each running request, kept on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.device.staging import Staging
from service.engine.request import Request
from service.engine.scheduler import Chunk


class TokenCounts:
    """Counts for the requests that ask for them. Memory is taken at the first use: 4 bytes a token and row."""

    def __init__(self, max_requests: int, vocab_size: int, device: torch.device) -> None:
        self._shape = max_requests, vocab_size
        self._device = device
        self._staging = Staging(device)
        self._counts: Tensor | None = None
        self._owners: list[tuple[int, int]] = [(0, 0)] * max_requests

    def of(self, chunks: Sequence[Chunk], rows: Tensor, last_ids: Tensor) -> Tensor:
        """[S, V] int32, before the tokens of this step. A request that is new to its row is copied in.

        rows: [S], the row of each chunk's request.   last_ids: the last sampled token of each row.
        """
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        new = [chunk for chunk in chunks if self._owners[chunk.request.row] != _owner(chunk.request)]
        if new:
            self._copy_in(self._counts, new, last_ids)
        return self._counts[rows]

    def add(self, rows: Tensor, ids: Tensor) -> None:
        """Count the tokens that a step has sampled, one per row."""
        assert self._counts is not None
        self._counts[rows, ids] += 1

    def _copy_in(self, counts: Tensor, chunks: Sequence[Chunk], last_ids: Tensor) -> None:
        """Count what the output of these requests holds already: only of one that has been preempted, it holds any."""
        places: list[int] = []
        for chunk in chunks:
            request = chunk.request
            self._owners[request.row] = _owner(request)
            counts[request.row].zero_()
            places += [request.row * self._shape[1] + token_id for token_id in request.output_ids]
            if chunk.start + chunk.length > len(request.prompt_ids) + len(request.output_ids):
                # Sampled by the step before this one, which the host has not read.
                unread = last_ids[request.row : request.row + 1]
                counts[request.row].scatter_add_(0, unread, torch.ones_like(unread, dtype=torch.int32))
        if places:
            taken = self._staging.take(8 * len(places))
            taken.view(torch.int64).numpy()[:] = places
            sent = self._staging.send(taken).view(torch.int64)
            counts.view(-1).scatter_add_(0, sent, torch.ones_like(sent, dtype=torch.int32))


def _owner(request: Request) -> tuple[int, int]:
    return request.serial, request.num_preemptions
