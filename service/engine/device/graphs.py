"""Decode steps as CUDA graphs: the kernels of one, launched by one call."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.device.batch import Batch
from service.engine.scheduler import Step

GRAPH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Batch sizes of captured decode steps; a batch runs in the smallest that holds it."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, and where it leaves the logits of its requests."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """The captured decode steps of a runner, one for each bucket; none before `capture` and after `destroy`.

    Args:
        max_requests: of a step; no bucket is larger.
    """

    def __init__(self, max_requests: int) -> None:
        self.buckets = [bucket for bucket in GRAPH_BUCKETS if bucket <= max_requests]
        self._captured: dict[int, Captured] = {}

    def bucket_of(self, step: Step) -> int | None:
        """The requests that a step is to be padded to, so that a graph can run it; None if none can."""
        if not self._captured or not step.is_decode:
            return None
        place = bisect_left(self.buckets, len(step.chunks))
        return self.buckets[place] if place < len(self.buckets) else None

    def capture(self, blank: Callable[[int], Batch], forward: Callable[[Batch], Tensor]) -> Iterator[int]:
        """Capture a step of every bucket, and use them once all are there; yields each bucket that is done.

        Args:
            blank: a step of so many requests, in the buffers that every step of that size will be in.
            forward: what is captured: the logits of a step's requests.
        """
        pool = torch.cuda.graph_pool_handle()
        captured = {}
        # Largest first, so that the smaller graphs reuse its memory.
        for bucket in reversed(self.buckets):
            batch = blank(bucket)
            graph = torch.cuda.CUDAGraph()
            # Other engines' threads wait for events of theirs meanwhile, which the default mode forbids.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = forward(batch)
            captured[bucket] = Captured(graph, logits)
            yield bucket
        self._captured = captured

    def replay(self, bucket: int) -> Tensor:
        """Launch the step that lies in the buffers: logits [bucket, V], good until the next replay of any bucket."""
        captured = self._captured[bucket]
        captured.graph.replay()
        return captured.logits

    def destroy(self) -> None:
        """Give the graphs' memory back, once none of them runs. Idempotent."""
        captured, self._captured = self._captured, {}
        for each in captured.values():
            each.graph.reset()
