"""What one rank holds of a Linear."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

Ranges: TypeAlias = tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The rows or columns of a weight [N, K] that one of several ranks holds; all of them where None.

    rows: outputs, as ranges in the order in which the rank has them. The ranks' outputs stand side by side.
    columns: inputs. Every rank's output is then a sum over a part of K, and the ranks' sums must be added up.
    adds: whether it adds what is added once for all ranks, such as a bias.

    Source: Megatron-LM (arXiv 1909.08053), section 3.
    """

    rows: Ranges | None = None
    columns: Ranges | None = None
    adds: bool = True

    def transposed(self) -> Part:
        """The same part of the transposed weight."""
        return replace(self, rows=self.columns, columns=self.rows)


WHOLE = Part()
"""All of a Linear, as where there is one rank."""


def taken(tensor: Tensor, part: Part) -> Tensor:
    """A part of a tensor [N] or [N, K] in memory, in memory of its own; the tensor itself if it is all of it."""
    for dim, ranges in enumerate((part.rows, part.columns)):
        if ranges is not None:
            tensor = torch.cat([tensor.narrow(dim, each.start, len(each)) for each in ranges], dim)
    return tensor


def total(ranges: Ranges | None, whole: int) -> int:
    """How many indices ranges hold; whole if None."""
    return whole if ranges is None else sum(map(len, ranges))
