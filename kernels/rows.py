"""Where the token rows of a step stand: in their requests, and in the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The positions and cache locations of a step's T token rows. int32 tensors on the device.

    positions, slots: [T].   query_starts: [B + 1].   context_lens: [B].   block_tables: [B, W].
    is_decode: whether no request has more than one row.
    arrivals: [B, G] zeros, in which kernels count and which they leave at 0, of no step that may run at the same time;
        None: whoever needs them allocates them.
    is_alone: whether no row reads a key that another row of the step writes, as drafts do, and the rows of a prompt.
    """

    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    is_decode: bool
    arrivals: Tensor | None = None
    is_alone: bool = False
