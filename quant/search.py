"""The best smoothing of each group and the best ranges of each Linear, by the error of the int8 product itself.

    error = ||X W^T - int8(X / s) int8(W s)^T||^2

over a sample of the calibration tokens, with weights rounded as they will be stored and the product computed by the
`Int8Linear` that will be served.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.inputs import Inputs
from quant.int8 import Int8Tensors
from quant.rounding import quantize_weight, static_scale
from quant.scheme import Scheme
from quant.smooth import SmoothGroup, copied, divide, group_migration

ALPHAS = tuple(step / 10 for step in range(11))
"""What "search" tries, beside no smoothing at all."""

RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the largest magnitude at which a scale that many values share is tried: few clip, the rest rounds finer."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a group: alpha (None: not smoothed), and its error as a share of the product's energy."""

    alpha: float | None
    error: float


def smooth_layer(
    state: dict[str, Tensor],
    groups: Sequence[SmoothGroup],
    inputs: MutableMapping[str, Inputs],
    scheme: Scheme,
    dtype: torch.dtype,
) -> dict[str, Choice]:
    """Smooth the groups of one layer in place, each with the scheme's alpha or with that of the least error.

    Groups are taken in the order given; a Linear that is the sink of one and the source of another (up_proj) counts in
    the later one as the earlier one left it.

    Args:
        state: float tensors by checkpoint name, weights [N, K]; those of a group are replaced.
        groups: what to smooth.
        inputs: of the Linears that will be quantized, by name; replaced by the smoothed ones.
        scheme: one that smooths.
        dtype: what norms and scales will be stored in.

    Returns:
        The choice by source.

    Raises:
        ValueError: a tensor of a group is missing, no sink of it was run, or widths do not agree.
    """
    alphas = (None, *ALPHAS) if scheme.smoothing == "search" else (scheme.smoothing,)
    choices = {}
    for group in groups:
        trial = _Trial(state, group, inputs, scheme, dtype)
        error, alpha, changed, s = min((trial.run(alpha) for alpha in alphas), key=lambda result: result[0])
        state.update(changed)
        for sink in trial.sinks:
            inputs[sink] = inputs[sink].divided(s)
        choices[group.source] = Choice(alpha, error)
    return choices


class _Trial:
    """One group, smoothed with one alpha after the other; nothing is changed."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        group: SmoothGroup,
        inputs: Mapping[str, Inputs],
        scheme: Scheme,
        dtype: torch.dtype,
    ) -> None:
        names = [f"{module}.{kind}" for module in (group.source, *group.sinks) for kind in ("weight", "bias")]
        self.tensors = {name: state[name] for name in names if name in state}
        self.group = group
        # Others read the activation too, a router for one, and stay float: they have no error.
        self.sinks = [sink for sink in group.sinks if sink in inputs]
        self.inputs = {name: inputs[name] for name in (group.source, *self.sinks) if name in inputs}
        self.scheme = scheme
        self.dtype = dtype
        self.products = {name: self.inputs[name].rows @ self.tensors[f"{name}.weight"].T for name in self.inputs}
        self.energy = sum(_energy(self.products[sink]) for sink in self.sinks)

    def run(self, alpha: float | None) -> tuple[float, float | None, dict[str, Tensor], Tensor]:
        """(error, alpha, the group's tensors smoothed, s of the sinks' columns)."""
        absmax = {sink: self.inputs[sink].absmax for sink in self.sinks}
        changed = dict(self.tensors)
        if alpha is None:
            s = torch.ones_like(absmax[self.sinks[0]])
        else:
            s = divide(changed, self.group, group_migration(changed, self.group, absmax, alpha), self.dtype)
        error = sum(_energy(self._deviation(sink, changed, s)) for sink in self.sinks)
        # Dividing rows leaves scales per row or group as good as they were; a scale for all rows it does not.
        if self.scheme.weight == "tensor" and self.group.source in self.inputs:
            error += self._carried_error(changed)
        return error / max(self.energy, 1e-30), alpha, changed, s

    def _deviation(self, name: str, tensors: Mapping[str, Tensor], s: Tensor) -> Tensor:
        """Of a Linear's int8 product from its float one, its input divided by s."""
        inputs = self.inputs[name].divided(s)
        int8 = round_nearest(tensors[f"{name}.weight"], inputs, self.scheme, self.dtype)
        return product(int8, inputs.rows, self.scheme) - self.products[name]

    def _carried_error(self, changed: Mapping[str, Tensor]) -> float:
        """What the source Linear's own rounding adds to the sinks' outputs.

        A channel of its output that is off by a share r of its energy leaves the sink's input, which is linear in it,
        off by that share too: sum_k r_k ||x_k||^2 ||w_k||^2.
        """
        name = self.group.source
        before, after = self.tensors[f"{name}.weight"], changed[f"{name}.weight"]
        inputs = self.inputs[name]
        s = before.abs().sum(1) / after.abs().sum(1).clamp_min(1e-30)
        got = product(round_nearest(after, inputs, self.scheme, self.dtype), inputs.rows, self.scheme) * s
        energy = self.products[name].square().sum(0).clamp_min(1e-30)
        share = copied((got - self.products[name]).square().sum(0) / energy, self.group)
        return sum(float(self._channel_energies(sink) @ share) for sink in self.sinks)

    def _channel_energies(self, sink: str) -> Tensor:
        """What each input channel of a sink contributes to its output, as if the others were 0: [K]."""
        return self.inputs[sink].rows.square().sum(0) * self.tensors[f"{sink}.weight"].square().sum(0)


def round_nearest(
    weight: Tensor,
    inputs: Inputs | None,
    scheme: Scheme,
    dtype: torch.dtype,
    weight_range: float = 1.0,
    input_range: float = 1.0,
) -> Int8Tensors:
    """A Linear in int8, with these shares of the largest magnitudes as its ranges; scales stored in dtype.

    inputs: what it reads; None where no scale of it is stored.
    """
    assert scheme.weight != "float"
    codes, scale = quantize_weight(weight, scheme.weight, dtype, scheme.group_size, weight_range)
    absmax = None if inputs is None or scheme.activation != "static" else inputs.absmax.amax().reshape(1)
    return Int8Tensors(codes, scale, None if absmax is None else static_scale(absmax * input_range, dtype))


def product(int8: Int8Tensors, rows: Tensor, scheme: Scheme) -> Tensor:
    """What the Linear that will be served makes of rows [R, K]: [R, N] float32."""
    return int8.linear(scheme, None)(rows)


def best_ranges(weight: Tensor, inputs: Inputs, scheme: Scheme, dtype: torch.dtype) -> tuple[float, float]:
    """Shares of the weight's and the input's largest magnitude with the least error of the product.

    Only a scale that a whole matrix or a whole calibration shares is worth clipping for; others stay at 1.
    """
    if scheme.weight != "tensor" and scheme.activation != "static":
        return 1.0, 1.0
    wanted = inputs.rows @ weight.T

    def error(weight_range: float, input_range: float) -> float:
        int8 = round_nearest(weight, inputs, scheme, dtype, weight_range, input_range)
        return _energy(product(int8, inputs.rows, scheme) - wanted)

    weight_range = input_range = 1.0
    if scheme.weight == "tensor":
        weight_range = min(RANGES, key=lambda share: error(share, 1.0))
    if scheme.activation == "static":
        input_range = min(RANGES, key=lambda share: error(weight_range, share))
    return weight_range, input_range


def _energy(y: Tensor) -> float:
    return float(y.square().sum())
