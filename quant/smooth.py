"""SmoothQuant: outlier channels of an activation divided away, and multiplied into the weights that read them.

    Y = X W^T = (X diag(1/s)) (W diag(s))^T

The division costs nothing at run time: it is folded into the op that writes X.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_S, MAX_S = 1e-5, 1e5
"""Bounds of one channel's migration. Beyond them a folded norm weight leaves what float16 holds well."""


@dataclass(frozen=True, slots=True)
class SmoothGroup:
    """One smoothed activation: who writes it and who reads it.

    source: module whose output channels are divided by s: a norm (its weight [K] and bias), or a Linear (its rows and
        bias), as up_proj is for down_proj because SiLU(gate) * up is linear in up, and v_proj for o_proj because
        attention's output is linear in the values.
    sinks: every Linear that reads that output; their input columns are multiplied by s. A reader left out would see
        a changed activation.
    num_copies, head_size: of v -> o, where each source head of head_size channels is read num_copies times side by
        side (grouped queries); the copies then share their s. head_size matters only where num_copies is above 1.
    offset: a norm multiplies by weight + offset, as Gemma's does with 1.
    """

    source: str
    sinks: tuple[str, ...]
    num_copies: int = 1
    head_size: int = 0
    offset: float = 0.0


def migration(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """How far to divide each channel of an activation.

    s_k = x_absmax_k^alpha / w_absmax_k^(1 - alpha)

    Args:
        x_absmax: [K] float, largest magnitude of the activation's channel k over the calibration tokens.
        w_absmax: [K] float, largest magnitude of column k over all weights that read it.
        alpha: 0 (all difficulty stays with the activation) to 1 (all goes to the weights).

    Returns:
        s [K] float32 in MIN_S..MAX_S. A channel that is dead on either side (absmax 0) has nothing to balance: s = 1.

    Raises:
        ValueError: alpha is outside 0..1, the shapes differ, or an absmax is negative or not finite.

    Source: SmoothQuant (arXiv 2211.10438), equation 4.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha = {alpha} is outside 0..1")
    if x_absmax.ndim != 1 or x_absmax.shape != w_absmax.shape:
        raise ValueError(f"x_absmax {list(x_absmax.shape)} and w_absmax {list(w_absmax.shape)} must both be [K]")
    x, w = x_absmax.float(), w_absmax.float()
    for name, values in (("x_absmax", x), ("w_absmax", w)):
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError(f"{name} holds a value that is negative or not finite")
    # Float64: 0.5 powers of tiny columns would otherwise lose digits to float32's subnormals.
    s = x.double().pow(alpha) / w.double().pow(1.0 - alpha)
    s = s.clamp(MIN_S, MAX_S).float()
    return torch.where((x == 0) | (w == 0), 1.0, s)


def fold(
    state: dict[str, Tensor],
    groups: Sequence[SmoothGroup],
    absmax: Mapping[str, Tensor],
    alpha: float,
    norm_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Smooth every group in place: source / s, sinks * s, s by `migration`. The float function stays the same.

    Groups are folded in the order given; a Linear that is the sink of one and the source of another (up_proj) counts
    in the later one as the earlier one left it.

    Args:
        state: tensors by checkpoint name (`X.weight`, `X.bias`). Those of a group are replaced by float32 ones.
        groups: what to smooth.
        absmax: float32 [K] by Linear name, as `calibrate` gives it.
        alpha: strength, 0..1.
        norm_dtype: see `divide`.

    Returns:
        absmax after smoothing: x / s for the sinks, the others as they were.

    Raises:
        ValueError: a tensor or an absmax of a group is missing, or widths do not agree.
    """
    smoothed = dict(absmax)
    for group in groups:
        s = divide(state, group, group_migration(state, group, smoothed, alpha), norm_dtype)
        for sink in group.sinks:
            if sink in smoothed:
                smoothed[sink] = smoothed[sink].float() / s
    return smoothed


def group_migration(
    state: Mapping[str, Tensor], group: SmoothGroup, absmax: Mapping[str, Tensor], alpha: float
) -> Tensor:
    """How far a group's channels are divided: `migration` over all its sinks, and over all copies of a channel.

    Args:
        state: tensors by checkpoint name.
        absmax: float32 [K] by sink name; a sink without one (a float router) reads what the others read.

    Returns:
        s [N] float32, N the source's channels.

    Raises:
        ValueError: a tensor of a sink is missing, no sink has an absmax, or widths do not agree.
    """
    weights = [_float_weight(state, sink, group) for sink in group.sinks]
    x_absmax = _shared_absmax(absmax, group)
    w_absmax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return migration(_joined(x_absmax, group), _joined(w_absmax, group), alpha)


def divide(state: dict[str, Tensor], group: SmoothGroup, s: Tensor, norm_dtype: torch.dtype = torch.float32) -> Tensor:
    """Divide the channels that a group's source writes by s [N] and multiply its sinks' columns, in place.

    Args:
        state: tensors by checkpoint name; those of the group are replaced by float32 ones.
        norm_dtype: what norm weights will be stored in. They are rounded to it here and s is taken from the rounded
            weight, so that storing them moves no channel away from what its sinks were multiplied by.

    Returns:
        What the sinks' columns were multiplied by, [K] float32.

    Raises:
        ValueError: a tensor is missing, or source and sinks do not have as many channels as s.
    """
    weights = [_float_weight(state, sink, group) for sink in group.sinks]
    read = copied(_divide_source(state, group, s, norm_dtype), group)
    for sink, weight in zip(group.sinks, weights, strict=True):
        if weight.shape[1] != read.shape[0]:
            raise _uneven(group, s.shape[0], weight.shape[1])
        state[f"{sink}.weight"] = weight * read
    return read


def _joined(channels: Tensor, group: SmoothGroup) -> Tensor:
    """The largest of the copies of each source channel: [K] -> [N]."""
    if group.num_copies == 1:
        return channels
    return channels.view(-1, group.num_copies, group.head_size).amax(1).flatten()


def copied(channels: Tensor, group: SmoothGroup) -> Tensor:
    """A value of each source channel at all its copies: [N] -> [K]."""
    if group.num_copies == 1:
        return channels
    return channels.view(-1, 1, group.head_size).expand(-1, group.num_copies, -1).flatten()


def _divide_source(state: dict[str, Tensor], group: SmoothGroup, s: Tensor, norm_dtype: torch.dtype) -> Tensor:
    """Divide the source's weight and bias; the s that was truly applied, after a norm's rounding."""
    weight = _float_weight(state, group.source, group)
    if weight.shape[0] != s.shape[0]:
        raise _uneven(group, weight.shape[0], s.shape[0])
    if weight.ndim == 1:
        factor = weight + group.offset
        stored = (factor / s - group.offset).to(norm_dtype).float()
        divided = stored + group.offset
        # A factor of 0, or one that rounds to 0 or infinity, gives no ratio: such a channel is not smoothed.
        is_usable = (divided != 0) & divided.isfinite() & (factor != 0)
        state[f"{group.source}.weight"] = torch.where(is_usable, stored, weight)
        s = torch.where(is_usable, factor / divided, 1.0)
    else:
        state[f"{group.source}.weight"] = weight / s[:, None]
    bias_name = f"{group.source}.bias"
    if bias_name in state:
        state[bias_name] = state[bias_name].float() / s
    return s


def _float_weight(state: Mapping[str, Tensor], module: str, group: SmoothGroup) -> Tensor:
    weight = state.get(f"{module}.weight")
    if weight is None:
        raise ValueError(f"cannot smooth {group.source} -> {', '.join(group.sinks)}: no tensor {module}.weight")
    return weight.float()


def _shared_absmax(absmax: Mapping[str, Tensor], group: SmoothGroup) -> Tensor:
    known = [absmax[sink].float() for sink in group.sinks if sink in absmax]
    if not known:
        missing = ", ".join(group.sinks) or "any sink"
        raise ValueError(f"cannot smooth {group.source}: no activation range for {missing}")
    shapes = sorted({tuple(values.shape) for values in known})
    if len(shapes) > 1:
        raise ValueError(f"cannot smooth {group.source}: its sinks read different widths {shapes}")
    return torch.stack(known).amax(0)


def _uneven(group: SmoothGroup, num_written: int, num_read: int) -> ValueError:
    return ValueError(
        f"cannot smooth {group.source} -> {', '.join(group.sinks)}: the source writes {num_written} channels, "
        f"the sinks read {num_read}"
    )
