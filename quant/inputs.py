"""What the Linears of one layer read over the calibration windows: ranges, a sample of rows, and second moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Inputs:
    """The input X [T, K] of one Linear, T counted over all windows.

    absmax: float32 [K], max_t |x_tk|.
    rows: float32 [R, K], rows of X drawn at random.
    gram: float32 [K, K], X^T X; None where it is not needed.
    """

    absmax: Tensor
    rows: Tensor
    gram: Tensor | None

    def divided(self, s: Tensor) -> Inputs:
        """The input X / s of a smoothed Linear, s [K]."""
        gram = None if self.gram is None else self.gram / s / s[:, None]
        return Inputs(self.absmax / s, self.rows / s, gram)


class InputTap:
    """A hook that gathers the input of one Linear, call by call.

    Args:
        share: of the rows that are kept, 0..1.
        has_gram: whether X^T X is summed.
        seed: of the choice of rows: the same for each Linear, so that readers of one activation keep the same rows.
    """

    def __init__(self, share: float, has_gram: bool, seed: int) -> None:
        self.share = share
        self.has_gram = has_gram
        self._generator = torch.Generator().manual_seed(seed)
        self._absmax: Tensor | None = None
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        absmax = x.abs().amax(0)
        self._absmax = absmax if self._absmax is None else torch.maximum(self._absmax, absmax)
        num_rows = max(1, round(self.share * len(x)))
        chosen = torch.randperm(len(x), generator=self._generator)[:num_rows].sort().values
        self._rows.append(x[chosen.to(x.device)])
        if self.has_gram:
            gram = x.T @ x
            self._gram = gram if self._gram is None else self._gram.add_(gram)

    def inputs(self) -> Inputs | None:
        """What was gathered; None where the Linear never ran (an expert that no token chose)."""
        if self._absmax is None:
            return None
        return Inputs(self._absmax, torch.cat(self._rows), self._gram)


@contextmanager
def tapped(linears: Mapping[str, nn.Module], share: float, has_gram: bool, seed: int) -> Iterator[dict[str, InputTap]]:
    """Taps on Linears by name, for as long as the context lasts."""
    taps = {name: InputTap(share, has_gram, seed) for name in linears}
    handles = [linear.register_forward_pre_hook(taps[name]) for name, linear in linears.items()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
