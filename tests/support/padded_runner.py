"""Padded steps on the CPU: what a GPU replays from a graph is computed as it is captured, padding included."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from service.engine.device.graphs import StepGraphs
from service.engine.device.runner import Forward, Runner
from service.engine.device.sampler import Choice
from service.engine.shapes import Shape


class PaddedSteps(StepGraphs[Forward]):
    """The shapes of a runner's graphs without the graphs. used: the steps run in each shape.

    The buffers behind a step's numbers and results hold what larger steps left, as on a GPU.
    """

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.max_tokens, runner.max_requests)
        self._runner = runner
        self.used: Counter[Shape] = Counter()
        self._captured = dict.fromkeys(self.shapes)  # type: ignore[assignment]  # only asked whether there are any

    def replay(self, shape: Shape) -> Forward:
        self.used[shape] += 1
        batch = self._runner._batches.view(
            num_tokens=shape.num_tokens,
            num_requests=shape.num_requests,
            num_samples=shape.num_requests,
            is_decode=shape.is_decode,
        )
        with torch.inference_mode():
            forward = self._runner._captured(batch)
        assert forward.likeliest is not None
        # A GPU copies them to the host before the next step.
        return replace(forward, likeliest=Choice(forward.likeliest.ids.clone(), forward.likeliest.faults.clone()))


def pad_steps(runner: Runner) -> PaddedSteps:
    """Let a runner on the CPU pad its steps."""
    runner._kept = runner._allocate()
    runner._graphs = steps = PaddedSteps(runner)
    return steps
