"""The inputs of one layer's Linears over the calibration windows: ranges, a sample of rows, and second moments.

Other tokens exceed a range that was measured on these, and a choice judged by the tokens that it was fitted to looks
too good. So every fourth window is held out: ranges are fitted to the others and judged by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant.convert.smoothquant import Channels
from quant.convert.split import Split

SAMPLED_ROWS = 1024
"""Number of tokens by which choices are judged: so many rows of a layer's inputs are kept in float32."""

HELD_OUT_EVERY = 4


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input X [T, K] of one Linear, T tokens of all windows.

    channels: over all tokens.
    fitted: over the tokens of the windows that are not held out; over all tokens if there is one window.
    rows: float32 [R, K], rows of X drawn at random from the windows held out.
    gram: float32 [K, K], X^T X; None if it is not needed.
    weights: float32 [R, 1], the weight of each row's error; None if all are equal.
    """

    channels: Channels
    fitted: Channels
    rows: Tensor
    gram: Tensor | None
    weights: Tensor | None = None

    def divided(self, s: Tensor) -> Inputs:
        """The input X / s of a smoothed Linear, s [K]."""
        gram = None if self.gram is None else self.gram / s / s[:, None]
        return Inputs(self.channels.over(s), self.fitted.over(s), self.rows / s, gram, self.weights)

    def split(self, split: Split) -> Inputs:
        """The input of the Linear after its columns were split."""
        origins = split.origins
        gram = None if self.gram is None else self.gram[origins][:, origins]
        channels, fitted = self.channels.at(origins), self.fitted.at(origins)
        return Inputs(channels, fitted, self.rows[:, origins], gram, self.weights).divided(split.copies)


def gather(
    linears: Mapping[str, nn.Module],
    run: Callable[[Tensor], Tensor],
    windows: Sequence[Tensor],
    *,
    has_gram: bool,
    seed: int,
    num_skipped: int = 0,
) -> tuple[list[Tensor], dict[str, Inputs]]:
    """Run a layer on all windows and gather the inputs of its Linears.

    Args:
        linears: of the layer, by name.
        run: the layer.
        windows: hidden states [1, L, hidden] that enter it, one or more.
        has_gram: whether X^T X is summed.
        num_skipped: tokens at the start of each window whose inputs are not gathered; their Linears must read whole
            windows.
        seed: of the choice of rows; the same for each Linear, so that readers of one activation keep the same rows.

    Returns:
        The layer's outputs, and the inputs of each Linear that ran (an expert that no token chose did not).
    """
    is_held_out = [_is_held_out(index, len(windows)) for index in range(len(windows))]
    num_tokens = [0, 0]
    for window, held in zip(windows, is_held_out, strict=True):
        num_tokens[held] += window.shape[1] - num_skipped
    taps = {name: _Tap(num_tokens, has_gram=has_gram, seed=seed, num_skipped=num_skipped) for name in linears}
    outputs = []
    with _hooked(linears, taps):
        for window, held in zip(windows, is_held_out, strict=True):
            for tap in taps.values():
                tap.is_held_out = held
            outputs.append(run(window))
    gathered = {name: tap.inputs() for name, tap in taps.items()}
    return outputs, {name: inputs for name, inputs in gathered.items() if inputs is not None}


def _is_held_out(index: int, num_windows: int) -> bool:
    return num_windows > 1 and index % HELD_OUT_EVERY == min(HELD_OUT_EVERY, num_windows) - 1


@dataclass(slots=True)
class _Gathered:
    """What was gathered from the windows of one kind. share: of the rows that are kept, 0..1."""

    share: float
    absmax: list[Tensor] = field(default_factory=list)
    energy: list[Tensor] = field(default_factory=list)
    num_tokens: int = 0
    rows: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, chosen: Tensor) -> None:
        self.absmax.append(x.abs().amax(0))
        self.energy.append(x.square().sum(0))
        self.num_tokens += len(x)
        self.rows.append(x[chosen])


def _channels(kinds: Sequence[_Gathered]) -> Channels:
    absmax = torch.stack([absmax for kind in kinds for absmax in kind.absmax]).amax(0)
    energy = torch.stack([energy for kind in kinds for energy in kind.energy]).sum(0)
    return Channels(absmax, (energy / max(1, sum(kind.num_tokens for kind in kinds))).sqrt())


class _Tap:
    """A hook that gathers the input of one Linear, call by call.

    Args:
        num_tokens: of the windows that are fitted to, and of those held out.
    """

    def __init__(self, num_tokens: Sequence[int], *, has_gram: bool, seed: int, num_skipped: int) -> None:
        self.is_held_out = False
        self._num_skipped = num_skipped
        self._kinds = [_Gathered(min(1.0, SAMPLED_ROWS / max(1, number))) for number in num_tokens]
        self._has_gram = has_gram
        self._gram: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        x = (x[..., self._num_skipped :, :] if self._num_skipped else x).flatten(0, -2).float()
        kind = self._kinds[self.is_held_out]
        num_rows = max(1, round(kind.share * len(x)))
        chosen = torch.randperm(len(x), generator=self._generator)[:num_rows].sort().values
        kind.add(x, chosen.to(x.device))
        if self._has_gram:
            gram = x.T @ x
            self._gram = gram if self._gram is None else self._gram.add_(gram)

    def inputs(self) -> Inputs | None:
        """What was gathered; None if the Linear never ran. If it saw one kind of window, that serves as both."""
        seen = [kind for kind in self._kinds if kind.rows]
        if not seen:
            return None
        return Inputs(_channels(seen), _channels(seen[:1]), torch.cat(seen[-1].rows), self._gram)


@contextmanager
def _hooked(linears: Mapping[str, nn.Module], taps: Mapping[str, _Tap]) -> Iterator[None]:
    handles = [linear.register_forward_pre_hook(taps[name]) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
