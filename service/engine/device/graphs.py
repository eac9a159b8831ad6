"""Steps as CUDA graphs, so that one call launches all kernels of a step."""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from service.engine.device.batch import Batch
from service.engine.scheduler import Step
from service.engine.shapes import Shape, shapes_of, without_slow

Output = TypeVar("Output")


@dataclass(frozen=True, slots=True)
class Captured(Generic[Output]):
    """A graph and what it writes."""

    graph: torch.cuda.CUDAGraph
    output: Output


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: graphs that it destroys would end a capture of this thread."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class StepGraphs(Generic[Output]):
    """The captured steps of a runner, one per shape; none before `capture` and after `destroy`.

    Args:
        max_tokens, max_requests: the largest step.
    """

    def __init__(self, max_tokens: int, max_requests: int) -> None:
        self.shapes = shapes_of(max_tokens, max_requests)
        self._decodes = [shape for shape in self.shapes if shape.is_decode]
        self._mixed = [shape for shape in self.shapes if not shape.is_decode]
        # Lists of their own, as a search with a key calls Python for each look.
        self._decode_sizes = [shape.num_requests for shape in self._decodes]
        self._mixed_sizes = [shape.num_tokens for shape in self._mixed]
        self._captured: dict[Shape, Captured[Output]] = {}

    def shape_of(self, step: Step) -> Shape | None:
        """The smallest shape that holds the step, or None if no graph can run it."""
        if not self._captured:
            return None
        num_requests = len(step.chunks)
        if step.is_decode:
            place = bisect_left(self._decode_sizes, num_requests)
            return self._decodes[place] if place < len(self._decodes) else None
        place = bisect_left(self._mixed_sizes, step.num_tokens)
        return next((shape for shape in self._mixed[place:] if shape.num_requests >= num_requests), None)

    def capture(self, blank: Callable[[Shape], Batch], forward: Callable[[Batch], Output]) -> Iterator[Shape]:
        """Capture a step of every shape, yielding each when done. The graphs are used once all are captured.

        Args:
            blank: returns a step of a shape, in the same buffers as later steps of that shape.
            forward: runs a step; this call is captured. What it returns must not be memory of the capture itself.
        """
        pool = torch.cuda.graph_pool_handle()
        captured = {}
        # Largest first, so that the smaller graphs reuse the memory of the largest.
        for shape in sorted(self.shapes, reverse=True):
            batch = blank(shape)
            graph = torch.cuda.CUDAGraph()
            # The default mode forbids other threads to wait for their events meanwhile, as other engines do.
            with no_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                output = forward(batch)
            captured[shape] = Captured(graph, output)
            yield shape
        self._captured = captured

    def leave_out_slow(self, times_s: Mapping[Shape, float]) -> None:
        """See `without_slow`."""
        self._mixed = without_slow(self._mixed, times_s)
        self._mixed_sizes = [shape.num_tokens for shape in self._mixed]

    def replay(self, shape: Shape) -> Output:
        """Launch the step in the buffers. What it returns is valid until the next replay of any shape."""
        captured = self._captured[shape]
        captured.graph.replay()
        return captured.output

    def destroy(self) -> None:
        """Free the graphs' memory; none of them may be running. Idempotent."""
        captured, self._captured = self._captured, {}
        for each in captured.values():
            each.graph.reset()
