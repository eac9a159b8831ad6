"""Decode steps as CUDA graphs, so that one call launches all kernels of a step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.device.batch import Batch
from service.engine.scheduler import Step

GRAPH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Batch sizes of captured decode steps; a batch is padded to the smallest that holds it."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph and its output, the logits of its requests."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """The captured decode steps of a runner, one per bucket; none before `capture` and after `destroy`.

    Args:
        max_requests: most requests of a step; larger buckets are left out.
    """

    def __init__(self, max_requests: int) -> None:
        self.buckets = [bucket for bucket in GRAPH_BUCKETS if bucket <= max_requests]
        self._captured: dict[int, Captured] = {}

    def bucket_of(self, step: Step) -> int | None:
        """The number of requests to pad the step to, or None if no graph can run it."""
        if not self._captured or not step.is_decode:
            return None
        place = bisect_left(self.buckets, len(step.chunks))
        return self.buckets[place] if place < len(self.buckets) else None

    def capture(self, blank: Callable[[int], Batch], forward: Callable[[Batch], Tensor]) -> Iterator[int]:
        """Capture a step of every bucket, yielding each bucket when done. The graphs are used once all are captured.

        Args:
            blank: returns a step of so many requests, in the same buffers as later steps of that size.
            forward: returns the logits of a step's requests; this call is captured.
        """
        pool = torch.cuda.graph_pool_handle()
        captured = {}
        # Largest first, so that the smaller graphs reuse the memory of the largest.
        for bucket in reversed(self.buckets):
            batch = blank(bucket)
            graph = torch.cuda.CUDAGraph()
            # The default mode forbids other threads to wait for their events meanwhile, as other engines do.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = forward(batch)
            captured[bucket] = Captured(graph, logits)
            yield bucket
        self._captured = captured

    def replay(self, bucket: int) -> Tensor:
        """Launch the step in the buffers. Returns logits [bucket, V], valid until the next replay of any bucket."""
        captured = self._captured[bucket]
        captured.graph.replay()
        return captured.logits

    def destroy(self) -> None:
        """Free the graphs' memory; none of them may be running. Idempotent."""
        captured, self._captured = self._captured, {}
        for each in captured.values():
            each.graph.reset()
