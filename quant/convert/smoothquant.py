"""SmoothQuant: divides an activation's outlier channels and multiplies the weights that read them.

    Y = X W^T = (X diag(1/s)) (W diag(s))^T

The division costs nothing at run time: it is folded into the op that writes X.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import Unquantizable

MIN_S, MAX_S = 1e-5, 1e5
"""Bounds of a channel's s. Beyond them a folded norm weight leaves float16's range of full precision."""

TINY = 1e-30
"""Divisor in place of 0."""


@dataclass(frozen=True, slots=True)
class SmoothGroup:
    """One smoothed activation: the module that writes it and the Linears that read it.

    source: module whose output channels are divided by s: a norm (its weight [K] and bias), or a Linear (its rows and
        bias), such as up_proj for down_proj, since SiLU(gate) * up is linear in up, and v_proj for o_proj, since
        attention's output is linear in the values.
    sinks: every Linear that reads that output; their input columns are multiplied by s. One that is left out would read
        a changed activation.
    num_copies, head_size: of v -> o with grouped queries, where each source head of head_size channels is read
        num_copies times in a row; the copies then share their s. head_size matters only if num_copies is above 1.
    offset: a norm multiplies by weight + offset; Gemma's offset is 1.
    gate: module whose output, after an activation function, multiplies the source's channel by channel, as gate_proj's
        does up_proj's; None for none. Such channels can be split (`quant.convert.split`).
    """

    source: str
    sinks: tuple[str, ...]
    num_copies: int = 1
    head_size: int = 0
    offset: float = 0.0
    gate: str | None = None


@dataclass(frozen=True, slots=True)
class Threshold:
    """share: of an activation's largest magnitude, in (0, 1]; channels with larger values are divided down to it."""

    share: float

    def __str__(self) -> str:
        return f"threshold {self.share:g}"


@dataclass(frozen=True, slots=True)
class Balance:
    """share: of the largest product of a channel's two ranges, in (0, 1], that the scales span; see `balance`."""

    share: float

    def __str__(self) -> str:
        return f"balance {self.share:g}"


Strength = float | Threshold | Balance
"""How strongly to smooth: SmoothQuant's alpha, a threshold, or a balance."""


@dataclass(frozen=True, slots=True)
class Channels:
    """The K channels of one side of a product over its rows: the largest magnitudes and the root mean squares.

    absmax, rms: float32 [K].
    """

    absmax: Tensor
    rms: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Channels:
        return cls(rows.abs().amax(0), rows.square().mean(0).sqrt())

    def at(self, places: Tensor) -> Channels:
        """The channels at these places, int64, which may be repeated."""
        return Channels(self.absmax[places], self.rms[places])

    def over(self, s: Tensor) -> Channels:
        """The channels of the same rows divided by s [K]."""
        return Channels(self.absmax / s, self.rms / s)


def migration(x: Channels, w: Channels, strength: Strength) -> Tensor:
    """The divisor s of each channel of an activation.

    s_k = max|x_k|^alpha / max|w_k|^(1 - alpha)            with an alpha
    s_k = max(1, max|x_k| / (share max_j max|x_j|))        with a threshold
    `balance`                                              with a balance

    Args:
        x: the activation's channels over the calibration tokens.
        w: the columns of all weights that read it.
        strength: alpha, from 0 (outliers stay in the activation) to 1 (they move to the weights), a threshold, or a
            balance.

    Returns:
        s [K] float32 in MIN_S..MAX_S; 1 for a channel that is 0 on either side.

    Raises:
        ValueError: alpha is outside 0..1 or a share outside (0, 1], or the shapes differ.
        Unquantizable: an absmax is negative or not finite.

    Source: SmoothQuant (arXiv 2211.10438), equation 4; Outlier Suppression+ (arXiv 2304.09145), section 4.2, for the
    threshold.
    """
    if isinstance(strength, float | int):
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"alpha = {strength} is outside 0..1")
    elif not 0.0 < strength.share <= 1.0:
        raise ValueError(f"{strength}: the share is outside 0..1")
    if x.absmax.ndim != 1 or x.absmax.shape != w.absmax.shape:
        raise ValueError(f"x absmax {list(x.absmax.shape)} and w absmax {list(w.absmax.shape)} must both be [K]")
    for name, values in (("x", x.absmax), ("w", w.absmax)):
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise Unquantizable(f"the absmax of {name} holds a value that is negative or not finite")
    is_dead = (x.absmax == 0) | (w.absmax == 0)
    # Float64: powers of tiny columns would lose digits to float32's subnormals.
    x, w = (Channels(side.absmax.double(), side.rms.double()) for side in (x, w))
    if isinstance(strength, Balance):
        s = balance(x, w, strength.share)
    elif isinstance(strength, Threshold):
        s = (x.absmax / (strength.share * x.absmax.amax())).clamp_min(1.0)
    else:
        s = x.absmax.pow(strength) / w.absmax.pow(1.0 - strength)
    return torch.where(is_dead, 1.0, s.clamp(MIN_S, MAX_S)).float()


def balance(x: Channels, w: Channels, share: float = 1.0) -> Tensor:
    """The divisor with the smallest rounding error if one scale covers all of X / s and one all of W s.

    With ranges A = max_k max|x_k| / s_k and B = max_k max|w_k| s_k, the steps are A / 127 and B / 127, and the energy
    of the error is in proportion to

        A^2 sum_k ||w_k||^2 s_k^2 + B^2 sum_k ||x_k||^2 / s_k^2

    Only the product A B matters, since s may be multiplied by any number. With it fixed, channel k adds least at
    s_k^2 = (B / A) ||x_k|| / ||w_k||, and is within both ranges for s_k in max|x_k| / A .. B / max|w_k|. All channels
    are if A B is at least P = max_k max|x_k| max|w_k|, the smallest product, with the finest steps, without clipping.

    Args:
        x, w: float64.
        share: A B = share P. Below 1 a few channels exceed the activation's range.

    Returns:
        s [K] float64, with a geometric mean of 1 over the channels that are not 0 on either side.
    """
    product = float((x.absmax * w.absmax).amax()) * share
    s = (product * x.rms / w.rms.clamp_min(TINY)).sqrt()
    s = torch.minimum(torch.maximum(s, x.absmax), product / w.absmax.clamp_min(TINY))
    is_alive = (x.absmax > 0) & (w.absmax > 0)
    return s / s[is_alive].log().mean().exp() if bool(is_alive.any()) else torch.ones_like(s)


def group_migration(
    state: Mapping[str, Tensor],
    group: SmoothGroup,
    read: Mapping[str, Channels],
    strength: Strength,
    columns: Channels | None = None,
) -> Tensor:
    """The divisor of a group's channels: `migration` over all its sinks and all copies of a channel.

    Args:
        state: tensors by checkpoint name.
        read: the input channels of each sink, by name; a sink without them (a float router) reads what the others read.
        columns: the result of `group_columns`, if known already.

    Returns:
        s [N] float32, N the source's channels.

    Raises:
        ValueError: a tensor of a sink is missing, no sink has an activation, or widths do not agree.
    """
    activation = _joined(_read(read, group), group)
    return migration(activation, group_columns(state, group) if columns is None else columns, strength)


def group_columns(state: Mapping[str, Tensor], group: SmoothGroup) -> Channels:
    """The columns of all weights that read a group's channels, [N].

    Raises:
        ValueError: a tensor of a sink is missing.
    """
    weights = [Channels.of(_float_weight(state, sink, group)) for sink in group.sinks]
    return _joined(_widest(weights), group)


def divide(state: dict[str, Tensor], group: SmoothGroup, s: Tensor, norm_dtype: torch.dtype = torch.float32) -> Tensor:
    """Divide the channels that a group's source writes by s [N] and multiply its sinks' columns, in place.

    Args:
        state: tensors by checkpoint name; those of the group are replaced by float32 ones.
        norm_dtype: of stored norm weights. They are rounded to it here and s is taken from the rounded weight, so that
            it is exactly what the sinks are multiplied by.

    Returns:
        The factor of the sinks' columns, [K] float32.

    Raises:
        ValueError: a tensor is missing, or source and sinks do not have as many channels as s.
    """
    weights = [_float_weight(state, sink, group) for sink in group.sinks]
    read = copied(divide_source(state, group, s, norm_dtype), group)
    for sink, weight in zip(group.sinks, weights, strict=True):
        if weight.shape[1] != read.shape[0]:
            raise _uneven(group, s.shape[0], weight.shape[1])
        state[f"{sink}.weight"] = weight * read
    return read


def _joined(channels: Channels, group: SmoothGroup) -> Channels:
    """The largest of the copies of each source channel: [K] -> [N]."""
    if group.num_copies == 1:
        return channels
    shape = (-1, group.num_copies, group.head_size)
    return Channels(channels.absmax.view(shape).amax(1).flatten(), channels.rms.view(shape).amax(1).flatten())


def copied(channels: Tensor, group: SmoothGroup) -> Tensor:
    """The value of each source channel, repeated for its copies: [N] -> [K]."""
    if group.num_copies == 1:
        return channels
    return channels.view(-1, 1, group.head_size).expand(-1, group.num_copies, -1).flatten()


def divide_source(state: dict[str, Tensor], group: SmoothGroup, s: Tensor, norm_dtype: torch.dtype) -> Tensor:
    """Divide the source's weight and bias by s [N], in place; returns the s after the rounding of a norm's weight."""
    weight = _float_weight(state, group.source, group)
    if weight.shape[0] != s.shape[0]:
        raise _uneven(group, weight.shape[0], s.shape[0])
    if weight.ndim == 1:
        factor = weight + group.offset
        stored = (factor / s - group.offset).to(norm_dtype).float()
        divided = stored + group.offset
        # A factor that is 0, or rounds to 0 or infinity, has no ratio: such a channel is not smoothed.
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


def _read(read: Mapping[str, Channels], group: SmoothGroup) -> Channels:
    """The input channels of a group's sinks."""
    known = [read[sink] for sink in group.sinks if sink in read]
    if not known:
        missing = ", ".join(group.sinks) or "any sink"
        raise ValueError(f"cannot smooth {group.source}: no activation range for {missing}")
    shapes = sorted({tuple(channels.absmax.shape) for channels in known})
    if len(shapes) > 1:
        raise ValueError(f"cannot smooth {group.source}: its sinks read different widths {shapes}")
    return _widest(known)


def _widest(channels: Sequence[Channels]) -> Channels:
    """The largest values of each channel."""
    absmax = torch.stack([side.absmax.float() for side in channels]).amax(0)
    return Channels(absmax, torch.stack([side.rms.float() for side in channels]).amax(0))


def _uneven(group: SmoothGroup, num_written: int, num_read: int) -> ValueError:
    return ValueError(
        f"cannot smooth {group.source} -> {', '.join(group.sinks)}: the source writes {num_written} channels, "
        f"the sinks read {num_read}"
    )
