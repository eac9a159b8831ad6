"""The one type that passes between ops: int8 codes with their scale, or the request to write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "CODE_MAX",
    "MIN_GROUP",
    "TINY",
    "Outliers",
    "Quantized",
    "ToInt8",
    "group_size_of",
    "require_scale",
]

CODE_MAX = 127
"""Codes live in -127..127. -128 is never written: the range stays symmetric."""

MIN_GROUP = 32
"""Fewest columns of a weight's row that may share a scale of their own: one step of the int8 tensor cores."""

TINY = 2.0**-100
"""A row whose largest magnitude is below this counts as zero: scale 1, codes 0 (no division by zero)."""


class Quantized(NamedTuple):
    """An int8 tensor: real = codes * scale.

    codes: [T, K] int8 in -127..127, rows contiguous.
    scale: float32, [T] (one per row) or [1] (one for the tensor).
    """

    codes: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together, as `Tensor.nbytes` says it of a float tensor."""
        return self.codes.nbytes + self.scale.nbytes


class Outliers(NamedTuple):
    """The columns of an activation [T, K] that a mixed-precision product keeps in float.

    columns: int32 [K]; the first `num_columns` are their indices, rising, the rest is not defined.
    num_columns: int32 [1], on the device, where nothing waits for the host to read it.
    """

    columns: Tensor
    num_columns: Tensor


@dataclass(frozen=True, slots=True)
class ToInt8:
    """Asks an op to write `Quantized` instead of float.

    scale: None for one dynamic scale per row (max |y_t| / 127), or a float32 tensor [1]: one static
    scale for the whole tensor, values beyond 127 scales saturating.
    """

    scale: Tensor | None = None


def group_size_of(weight_q: Tensor, weight_scale: Tensor) -> int:
    """The columns that share one scale, from weight_q [N, K] and weight_scale [N, K / group size].

    Raises:
        ValueError: weight_scale is not of that shape for a power of two from `MIN_GROUP` as the group size.
    """
    (N, K), shape = weight_q.shape, tuple(weight_scale.shape)
    size = K // shape[1] if len(shape) == 2 and shape[1] else 0
    if shape != (N, K // max(1, size)) or K % max(1, size) or size < MIN_GROUP or size & (size - 1):
        raise ValueError(
            f"weight_scale {shape} must be [N, K / group size] for weight_q {(N, K)}, the group size a power of two "
            f"from {MIN_GROUP} that divides K"
        )
    return size


def require_scale(scale: Tensor | None, zero_point: Tensor | None) -> None:
    """Raise unless a zero point comes with the scale that it belongs to.

    Raises:
        ValueError: a zero point without a scale.
    """
    if zero_point is not None and scale is None:
        raise ValueError("a zero point belongs to a scale that is given: a scale found in max |x| is symmetric")
