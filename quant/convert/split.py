"""Splits outlier channels of a gated activation into copies, which replace the channels that matter least.

    y = sum_k x_k w_k        x_j = silu(gate_j) up_j:        x_j w_j = sum of c times (x_j / c) w_j

Smoothing moves a channel's range from the activation to the weight, and if one scale covers a whole matrix both become
coarser. Copies reduce the range on both sides. They cost nothing at run time and change no shape: they replace the
channels of the least energy, whose loss is part of the error by which a split is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heapreplace

import torch
from torch import Tensor

from quant.convert.smoothquant import Channels, SmoothGroup, divide_source

SHARES = (1 / 96, 1 / 48, 1 / 24, 1 / 12)
"""Shares of the K channels that are replaced by copies; each is tried."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which channel each place holds.

    origins: int64 [K]; origins[k] = k if the channel is still in its place, another number if place k has a copy.
    """

    origins: Tensor

    @classmethod
    def of(cls, x: Channels, w: Channels, num_places: int) -> Split:
        """Use num_places places for copies of the channels whose two ranges have the largest product.

        The places are those of the channels with the least energy, rms(x_k) rms(w_k). Each goes to the channel that
        then has the largest max|x_k| max|w_k| / copies.

        Args:
            x: the activation's channels over the calibration tokens.
            w: the columns of the weight that reads it.
            num_places: 0 to K - 1.

        Source: outlier channel splitting (arXiv 1901.09504), which widens the layer instead.
        """
        energies = x.rms.double() * w.rms.double()
        places = energies.argsort(stable=True)[:num_places].tolist()
        given = set(places)
        products = (x.absmax.double() * w.absmax.double()).tolist()
        heap = [(-product, 1, k) for k, product in enumerate(products) if k not in given]
        heapify(heap)
        origins = torch.arange(len(products))
        for place in places:
            largest, copies, k = heap[0]
            heapreplace(heap, (largest * copies / (copies + 1), copies + 1, k))
            origins[place] = k
        return cls(origins.to(x.absmax.device))

    @property
    def copies(self) -> Tensor:
        """The number of copies of each place's channel: float32 [K]."""
        return torch.bincount(self.origins, minlength=len(self.origins))[self.origins].float()

    @property
    def moved(self) -> dict[str, int]:
        """The places that have another channel, in a form for JSON."""
        origins = self.origins.tolist()
        return {str(place): origin for place, origin in enumerate(origins) if place != origin}

    @classmethod
    def read(cls, moved: dict[str, int], width: int) -> Split:
        """The split of K = width channels that `moved` describes."""
        origins = torch.arange(width)
        for place, origin in moved.items():
            origins[int(place)] = origin
        return cls(origins)

    def apply(self, state: dict[str, Tensor], group: SmoothGroup) -> None:
        """Move the rows of a group's source and gate and the columns of its sinks, in place.

        Args:
            state: tensors by checkpoint name, weights [N, K]; those of the group are replaced by float32 ones.
            group: one with a gate.
        """
        assert group.gate is not None
        for name in (f"{module}.{kind}" for module in (group.source, group.gate) for kind in ("weight", "bias")):
            if name in state:
                state[name] = state[name].float()[self.origins]
        divide_source(state, group, self.copies, torch.float32)
        for sink in group.sinks:
            state[f"{sink}.weight"] = state[f"{sink}.weight"].float()[:, self.origins]
