"""ZeroQuant's layer-by-layer distillation: trains a layer's weights to give the float layer's output when rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kernels import CODE_MAX
from quant.convert.rounding import ScaleRule, dequantize, quantize_weight
from quant.scheme import Scheme

STEPS = 32
"""Updates per layer, each on one window."""

LEARNING_RATE = 0.003
"""Of Adam at the first step, as a share of the mean magnitude of each weight; it falls to 0."""

Run = Callable[[Tensor], Tensor]
"""A layer as the model calls it: hidden states in, hidden states out."""


class Student(nn.Module):
    """A Linear that computes like its int8 product, with gradients that ignore the rounding.

    Args:
        weight: [N, K] float32.
        bias: [N] or None.
        scheme: an int8 scheme with dynamic activations.
        scale_dtype: of the weight's scales.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, scheme: Scheme, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = bias
        self.activation = scheme.activation
        self.rule = ScaleRule.of(scheme, scale_dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = _straight_through(self.weight, self._rounded_weight())
        return nn.functional.linear(_straight_through(x, self._rounded_input(x)), weight, self.bias)

    @torch.no_grad()
    def _rounded_weight(self) -> Tensor:
        return dequantize(*quantize_weight(self.weight.detach(), self.rule))

    @torch.no_grad()
    def _rounded_input(self, x: Tensor) -> Tensor:
        absmax = x.abs().amax(-1, keepdim=True) if self.activation == "token" else x.abs().amax()
        scale = torch.where(absmax == 0, 1.0, absmax / CODE_MAX)
        return (x / scale).round() * scale


def distill(
    students: Sequence[Student], run: Run, windows: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[float, float]:
    """Train the students of one layer, in place, to give the output of the float layer.

    loss = mean_t ||run(h)_t - target_t||^2 / ||target_t||^2

    No labels and no other layer are needed. Windows are taken in turn and nothing is random, so the same layer gives
    the same weights. If training does not lower the loss, the weights are restored.

    Args:
        students: the Linears of the layer that are trained.
        run: applies the layer that contains them.
        windows: hidden states [1, L, hidden] that enter the layer.
        targets: the float layer's output for each.

    Returns:
        The loss over all windows before and after.

    Source: ZeroQuant (arXiv 2206.01861), section 4.3; the straight-through estimator is arXiv 1308.3432.
    """
    start = [student.weight.detach().clone() for student in students]
    before = _loss(run, windows, targets)
    _train([student.weight for student in students], run, windows, targets)
    after = _loss(run, windows, targets)
    if after < before:
        return before, after
    for student, weight in zip(students, start, strict=True):
        student.weight.data.copy_(weight)
    return before, before


@torch.enable_grad()
def _train(weights: Sequence[nn.Parameter], run: Run, windows: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": LEARNING_RATE * float(weight.detach().abs().mean())} for weight in weights]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for step in range(STEPS):
        index = step % len(windows)
        optimizer.zero_grad()
        _distance(run(windows[index]), targets[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _loss(run: Run, windows: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    pairs = zip(windows, targets, strict=True)
    return sum(float(_distance(run(window), target)) for window, target in pairs) / len(windows)


def _distance(output: Tensor, target: Tensor) -> Tensor:
    # Relative per token: a few tokens (the first of a text) have states a thousand times as large as the others'.
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)).mean()


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()
