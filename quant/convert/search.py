"""The best smoothing of each group and the best ranges of each Linear, by the error of the int8 product itself.

    error = sum_t w_t ||x_t W^T - int8(x_t / s) int8(W s)^T||^2

over a sample of the calibration tokens, with weights rounded as they are stored and the product computed by the
`Int8Linear` that is served. w_t is 1, or less for a token with large outputs; see LOUDNESS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import CODE_MAX
from quant.convert.inputs import Inputs
from quant.convert.int8 import Int8Tensors
from quant.convert.rounding import ScaleRule, quantize_weight, static_scale
from quant.convert.smoothquant import (
    TINY,
    Balance,
    Channels,
    SmoothGroup,
    Strength,
    Threshold,
    copied,
    divide,
    group_columns,
    group_migration,
)
from quant.convert.split import SHARES, Split
from quant.fused import LOWEST_CODE
from quant.scheme import Scheme

ALPHAS = tuple(step / 10 for step in range(11))
THRESHOLDS = tuple(Threshold(2.0**-octave) for octave in range(1, 11))
BALANCES = tuple(Balance(2.0 ** (-half_octave / 2)) for half_octave in range(16))
"""What "search" tries, beside no smoothing."""

LIKELY_ROWS = 256
"""Rows of a sample by which a range is estimated for every strength that is tried."""

SPLIT_STRENGTHS: tuple[Strength, ...] = (0.7, Threshold(2.0**-4), Balance(1.0), Balance(0.5))
"""What "search" tries with split channels, beside the best strength without: splitting removes the need for others."""

WORTH_SPLITTING = 0.9
"""Largest share of the error so far at which a split of more channels is taken."""

LOUDNESS = 1 / 3
"""The power of a token's output energy by which its error is divided, if tokens share a scale and a Linear's input is
not normed: in the inputs of o and down, tokens differ by a factor of a thousand.

With 0 a single token of a text, whose outputs are a thousand times the others', decides; with 1 it counts like any
other, though all tokens after it attend to it. See benchmarks/NOTES.md for the quality of both.
"""

RANGE_SHARES = (2.0, 1.5, 1.25, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""Shares of the largest magnitude that are tried for a scale that many values share.

Below 1 a few values clip and the rest is rounded finer; above 1 leaves room for tokens with larger values.
"""


class Ranges(NamedTuple):
    """Shares of the largest magnitudes of a weight and of its input that become code 127."""

    weight: float = 1.0
    input: float = 1.0


FULL_RANGES = Ranges()
"""Ranges without clipping."""


@dataclass(frozen=True, slots=True)
class SmoothingChoice:
    """The choice for a group.

    strength: None for no smoothing.
    error: as a share of the product's energy.
    split: None if no channel has copies.
    """

    strength: Strength | None
    error: float
    split: Split | None = None

    @property
    def note(self) -> float | str | None:
        """The strength as JSON holds it."""
        return str(self.strength) if isinstance(self.strength, Threshold | Balance) else self.strength


def smooth_layer(
    state: dict[str, Tensor],
    groups: Sequence[SmoothGroup],
    inputs: MutableMapping[str, Inputs],
    *,
    scheme_of: Callable[[str], Scheme],
    dtype: torch.dtype,
) -> dict[str, SmoothingChoice]:
    """Smooth the groups of one layer in place, each with its scheme's alpha or with the strength of the smallest error.

    Groups are smoothed in the order given. A Linear that is the sink of one and the source of another (up_proj) enters
    the second one with the changes of the first.

    Args:
        state: float tensors by checkpoint name, weights [N, K]; those of a group are replaced.
        groups: what to smooth.
        inputs: of the Linears that will be quantized, by name; replaced by the smoothed ones.
        scheme_of: what the Linear of a name is quantized by, with smoothing; the sinks of a group have one scheme.
        dtype: of stored norms and scales.

    Returns:
        The choice by source; a group whose sinks never ran is left unchanged.

    Raises:
        ValueError: a tensor of a group is missing, or widths do not agree.
    """
    choices = {}
    for group in groups:
        scheme = scheme_of(group.sinks[0])
        strengths: tuple[Strength | None, ...] = (None, *ALPHAS, *THRESHOLDS, *BALANCES)
        if scheme.smoothing != "search":
            strengths = (scheme.smoothing,)
        if not any(sink in inputs for sink in group.sinks):
            # An expert that no calibration token chose: no range is known.
            choices[group.source] = SmoothingChoice(None, 0.0)
            continue
        trial = _Trial(state, group, inputs, scheme=scheme, source_scheme=scheme_of(group.source), dtype=dtype)
        choice = trial.best(strengths)
        if scheme.smoothing == "search" and group.gate is not None and _shares_scales(scheme):
            trial, choice = _split(trial, choice)
        changed, s = trial.smoothed(choice.strength, {sink: trial.inputs[sink].channels for sink in trial.sinks})
        state.update(changed)
        for sink in trial.sinks:
            inputs[sink] = trial.inputs[sink].divided(s)
        choices[group.source] = choice
    return choices


def _split(whole: _Trial, choice: SmoothingChoice) -> tuple[_Trial, SmoothingChoice]:
    """The group with the number of split channels that pays, and the choice for it."""
    trial, strengths = whole, tuple(dict.fromkeys((choice.strength, *SPLIT_STRENGTHS)))
    for share in SHARES:
        narrower = whole.split(round(share * whole.width))
        found = narrower.best(strengths)
        if found.error <= WORTH_SPLITTING * choice.error:
            trial, choice = narrower, found
    return trial, choice


class _Trial:
    """Tries strengths on one group without changing it."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        group: SmoothGroup,
        inputs: Mapping[str, Inputs],
        *,
        scheme: Scheme,
        source_scheme: Scheme,
        dtype: torch.dtype,
    ) -> None:
        modules = (group.source, *group.sinks, *([group.gate] if group.gate is not None else []))
        names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
        self.tensors = {name: state[name] for name in names if name in state}
        self.group = group
        self.columns = group_columns(self.tensors, group)
        # Other readers of the activation, such as a router, stay float and have no error.
        self.sinks = [sink for sink in group.sinks if sink in inputs]
        self.inputs = {name: inputs[name] for name in (group.source, *self.sinks) if name in inputs}
        self.scheme = scheme
        self.source_scheme = source_scheme
        self.dtype = dtype
        self.products = {name: self.inputs[name].rows @ self.tensors[f"{name}.weight"].T for name in self.inputs}
        self.weights = {sink: self._token_weights(self.products[sink]) for sink in self.sinks}
        self.energy = sum(_energy(self.products[sink], self.weights[sink]) for sink in self.sinks)
        self.inputs |= {sink: replace(self.inputs[sink], weights=self.weights[sink]) for sink in self.sinks}
        self.channels_split: Split | None = None

    @property
    def width(self) -> int:
        """The number of channels that the sinks read."""
        return self.inputs[self.sinks[0]].rows.shape[1]

    def split(self, num_places: int) -> _Trial:
        """The same group with num_places copies, judged by the products of the group without copies."""
        sink = self.sinks[0]
        narrower = copy(self)
        narrower.tensors = dict(self.tensors)
        narrower.channels_split = Split.of(
            self.inputs[sink].fitted, Channels.of(self.tensors[f"{sink}.weight"].float()), num_places
        )
        narrower.channels_split.apply(narrower.tensors, self.group)
        narrower.columns = group_columns(narrower.tensors, self.group)
        narrower.inputs = self.inputs | {name: self.inputs[name].split(narrower.channels_split) for name in self.sinks}
        source = self.group.source
        if source in self.inputs:
            product = self.inputs[source].rows @ narrower.tensors[f"{source}.weight"].T
            narrower.products = self.products | {source: product}
        return narrower

    def _token_weights(self, y: Tensor) -> Tensor | None:
        """The weight of the error of each row of a sink's product y [R, N], [R, 1]: ||y_t||^(-2 LOUDNESS)."""
        source = self.tensors.get(f"{self.group.source}.weight")
        if source is None or source.ndim == 1 or not _shares_scales(self.scheme):
            return None
        energies = y.square().sum(1, keepdim=True)
        # Without a lower bound a token with almost no output would outweigh all others.
        return energies.clamp_min(TINY + 1e-6 * float(energies.mean())).pow(-LOUDNESS)

    def best(self, strengths: Sequence[Strength | None]) -> SmoothingChoice:
        """The strength with the smallest error."""
        choices = [SmoothingChoice(strength, self.error(strength), self.channels_split) for strength in strengths]
        return min(choices, key=lambda choice: choice.error)

    def smoothed(self, strength: Strength | None, read: Mapping[str, Channels]) -> tuple[dict[str, Tensor], Tensor]:
        """The group's tensors, smoothed for these ranges of its sinks' input, and s of their columns [K]."""
        changed = dict(self.tensors)
        if strength is None:
            return changed, torch.ones_like(read[self.sinks[0]].absmax)
        s = group_migration(changed, self.group, read, strength, self.columns)
        return changed, divide(changed, self.group, s, self.dtype)

    def error(self, strength: Strength | None) -> float:
        """The error on the rows held out, with ranges fitted to the others."""
        changed, s = self.smoothed(strength, {sink: self.inputs[sink].fitted for sink in self.sinks})
        read = {sink: self.inputs[sink].divided(s) for sink in self.sinks}
        weights = {sink: changed[f"{sink}.weight"] for sink in self.sinks}
        input_range = self._input_range(self.scheme, weights, read)
        error = sum(self._error(sink, weights[sink], read[sink], input_range) for sink in self.sinks)
        # Dividing rows does not affect scales per row or group, but it does affect one scale for all rows.
        if self.scheme.weight == "tensor" and self.group.source in self.inputs:
            error += self._carried_error(changed)
        return error / max(self.energy, TINY)

    def _input_range(self, scheme: Scheme, weights: Mapping[str, Tensor], inputs: Mapping[str, Inputs]) -> float:
        return likely_range(weights, inputs, self.dtype) if scheme.activation == "static" else 1.0

    def _error(self, name: str, weight: Tensor, inputs: Inputs, input_range: float) -> float:
        off = self._product(self.scheme, weight, inputs, input_range).sub_(self.products[name])
        return _energy(off, self.weights[name])

    def _product(self, scheme: Scheme, weight: Tensor, inputs: Inputs, input_range: float) -> Tensor:
        """The int8 product of a Linear on the rows held out, with ranges fitted to the others."""
        ranges = Ranges(input=input_range)
        int8 = round_nearest(weight, inputs.fitted.absmax, scheme, self.dtype, ranges)
        return product(int8, inputs.rows, scheme)

    def _carried_error(self, changed: Mapping[str, Tensor]) -> float:
        """The error that the rounding of the source Linear adds to the sinks' outputs.

        If a channel of its output has an error of a share r of its energy, the sink's input, which is linear in it, has
        the same share: sum_k r_k ||x_k||^2 ||w_k||^2. The errors of c copies of a channel are equal: they count c^2.
        """
        name = self.group.source
        before, after = self.tensors[f"{name}.weight"], changed[f"{name}.weight"]
        s = before.abs().sum(1) / after.abs().sum(1).clamp_min(TINY)
        scheme = self.source_scheme
        input_range = self._input_range(scheme, {name: after}, {name: self.inputs[name]})
        off = self._product(scheme, after, self.inputs[name], input_range) * s - self.products[name]
        energy = self.products[name].square().sum(0).clamp_min(TINY)
        share = copied(off.square().sum(0) / energy, self.group)
        if self.channels_split is not None:
            share *= self.channels_split.copies
        return sum(float(self._channel_energies(sink) @ share) for sink in self.sinks)

    def _channel_energies(self, sink: str) -> Tensor:
        """The energy that each input channel of a sink alone contributes to its output: [K]."""
        weight, rows = self.tensors[f"{sink}.weight"], self.inputs[sink].rows
        return _weighed(rows.square(), self.weights[sink]).sum(0) * weight.square().sum(0)


def round_nearest(
    weight: Tensor,
    absmax: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
    ranges: Ranges = FULL_RANGES,
) -> Int8Tensors:
    """A Linear in int8, with scales in dtype. absmax: [K] of its input; None if no input scale is stored."""
    codes, scale = quantize_weight(weight, ScaleRule.of(scheme, dtype, ranges.weight))
    if absmax is None or scheme.activation != "static":
        return Int8Tensors(codes, scale, None)
    return Int8Tensors(codes, scale, _input_scale(absmax, ranges.input, dtype))


def _input_scale(absmax: Tensor, input_range: float, dtype: torch.dtype) -> Tensor:
    return static_scale(absmax.amax().reshape(1) * input_range, dtype)


def product(int8: Int8Tensors, rows: Tensor, scheme: Scheme) -> Tensor:
    """The product of rows [R, K] by the Linear that is served: [R, N] float32."""
    return int8.linear(scheme, None)(rows)


def best_ranges(
    weights: Mapping[str, Tensor], inputs: Mapping[str, Inputs], scheme: Scheme, dtype: torch.dtype
) -> dict[str, Ranges]:
    """The ranges of Linears that read one activation, with the smallest error of their products on the rows held out.

    Only scales per matrix, and static ones, gain from clipping; others are not clipped. The Linears share the range of
    their input: where they are served as one product it is rounded once, with one scale.

    Args:
        weights: [N, K] by name.
        inputs: of the same names; they differ in the weights of their rows alone.
    """
    if scheme.weight != "tensor" and scheme.activation != "static":
        return dict.fromkeys(weights, FULL_RANGES)
    is_static = scheme.activation == "static"
    wanted = {name: inputs[name].rows @ weight.T for name, weight in weights.items()}

    def rounded(name: str, weight_range: float, input_range: float) -> Int8Tensors:
        ranges = Ranges(weight_range, input_range)
        return round_nearest(weights[name], inputs[name].fitted.absmax, scheme, dtype, ranges)

    def error(name: str, int8: Int8Tensors) -> float:
        read = inputs[name]
        return _energy(product(int8, read.rows, scheme).sub_(wanted[name]), read.weights)

    input_range = likely_range(weights, inputs, dtype) if is_static else 1.0
    weight_ranges = dict.fromkeys(weights, 1.0)
    if scheme.weight == "tensor":
        shares = [share for share in RANGE_SHARES if share <= 1]
        weight_ranges = {
            name: min(shares, key=lambda share: error(name, rounded(name, share, input_range))) for name in weights
        }
    if is_static:
        int8 = {name: rounded(name, weight_ranges[name], input_range) for name in weights}
        absmax = next(iter(inputs.values())).fitted.absmax
        scales = {share: _input_scale(absmax, share, dtype) for share in RANGE_SHARES}
        input_range = min(
            scales,
            key=lambda share: sum(error(name, replace(int8[name], input_scale=scales[share])) for name in weights),
        )
    return {name: Ranges(weight_range, input_range) for name, weight_range in weight_ranges.items()}


def likely_range(weights: Mapping[str, Tensor], inputs: Mapping[str, Inputs], dtype: torch.dtype) -> float:
    """The share of the input's largest magnitude with the smallest error if the weights' columns were orthogonal.

    error = sum_tk w_t (int8(x_tk) - x_tk)^2 ||w_k||^2 over some of the rows and all readers, without a matrix product.
    """
    first = next(iter(inputs.values()))
    step = max(1, len(first.rows) // LIKELY_ROWS)
    rows = first.rows[::step]
    energies = {name: weight.square().sum(0) for name, weight in weights.items()}
    shares = rows.new_tensor(RANGE_SHARES)
    scales = static_scale(first.fitted.absmax.amax().reshape(1) * shares, dtype).float()

    def error(scale: Tensor) -> float:
        off = (rows / scale).round_().clamp_(LOWEST_CODE, CODE_MAX).mul_(scale).sub_(rows).square_()
        total = 0.0
        for name, energy in energies.items():
            by_row = inputs[name].weights
            total += float(_weighed(off, None if by_row is None else by_row[::step]).sum(0) @ energy)
        return total

    errors = [error(scale) for scale in scales]
    return RANGE_SHARES[errors.index(min(errors))]


def readers_of_one(inputs: Mapping[str, Inputs]) -> list[list[str]]:
    """The names of Linears, those together that read the same activation."""
    groups: list[list[str]] = []
    for name, read in inputs.items():
        for group in groups:
            other = inputs[group[0]]
            if read.rows.shape == other.rows.shape and torch.equal(read.rows, other.rows):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _shares_scales(scheme: Scheme) -> bool:
    """Whether all rows of a weight, or all tokens, share one scale."""
    return scheme.weight == "tensor" or scheme.shares_activation_scales


def _energy(y: Tensor, weights: Tensor | None) -> float:
    return float(_weighed(y.square(), weights).sum())


def _weighed(x: Tensor, weights: Tensor | None) -> Tensor:
    return x if weights is None else weights * x
