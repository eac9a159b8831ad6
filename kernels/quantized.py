"""The one type that passes between ops: int8 codes with their scale, or the request to write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

CODE_MAX = 127
"""Codes live in -127..127. -128 is never written: the range stays symmetric."""

BLOCK = 128
"""Columns that share a scale where each row has several: the depth of one step of the product that reads them."""

TINY = 2.0**-100
"""A row whose largest magnitude is below this counts as zero: scale 1, codes 0 (no division by zero)."""


class Quantized(NamedTuple):
    """An int8 tensor: real = codes * scale.

    codes: [T, K] int8 in -127..127, rows contiguous.
    scale: float32, [T] (one per row), [1] (one for the tensor) or [T, ceil(K / BLOCK)] (one per row and 128 columns).
    """

    codes: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together, as `Tensor.nbytes` says it of a float tensor."""
        return self.codes.nbytes + self.scale.nbytes


@dataclass(frozen=True, slots=True)
class ToInt8:
    """Asks an op to write `Quantized` instead of float.

    scale: None for one dynamic scale per row (max |y_t| / 127), or a float32 tensor [1]: one static
    scale for the whole tensor, values beyond 127 scales saturating.
    is_blocked: one dynamic scale per row and `BLOCK` columns; only the Linears write it.

    Raises:
        ValueError: is_blocked with a scale.
    """

    scale: Tensor | None = None
    is_blocked: bool = False

    def __post_init__(self) -> None:
        if self.is_blocked and self.scale is not None:
            raise ValueError("is_blocked finds its own scales: scale must be None")
