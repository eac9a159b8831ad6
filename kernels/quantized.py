"""The types that pass between ops: int8 codes with their scale, and the request to write them."""

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
"""Largest code, and the one that the largest magnitude gets where a scale is found: weights, rows and heads have codes
in -127..127. Under a given scale, which activations may exceed, codes are in -128..127, as other tools' are."""

MIN_GROUP = 32
"""Smallest group of columns with its own scale: one step of the int8 tensor cores."""

TINY = 2.0**-100
"""A row whose largest magnitude is below this gets scale 1 and codes 0, which avoids a division by zero."""


class Quantized(NamedTuple):
    """An int8 tensor: real = codes * scale.

    codes: [T, K] int8, -128 only under a static scale; rows contiguous.
    scale: float32, [T] (one per row) or [1] (one for the tensor).
    """

    codes: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together, like `Tensor.nbytes`."""
        return self.codes.nbytes + self.scale.nbytes


class Outliers(NamedTuple):
    """The columns of an activation [T, K] that a mixed-precision product keeps in float.

    columns: int32 [K]; the first `num_columns` are their indices in rising order, the rest is not defined.
    num_columns: int32 [1], on the device; the host does not read it.
    """

    columns: Tensor
    num_columns: Tensor


@dataclass(frozen=True, slots=True)
class ToInt8:
    """Asks an op to write `Quantized` instead of float.

    scale: None for one dynamic scale per row (max |y_t| / 127), or float32 [1], one static scale for the whole tensor,
        with which values beyond 127 or -128 scales saturate.
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
    """Raise ValueError for a zero point without a scale."""
    if zero_point is not None and scale is None:
        raise ValueError("a zero point belongs to a scale that is given: a scale found in max |x| is symmetric")
