"""What transformers overrides without types, by the types of torch's own modules."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def evaluated(model: M) -> M:
    """The model itself, in evaluation mode."""
    return model.eval()


def in_float32(model: M) -> M:
    """The model itself, its floats in float32."""
    return model.float()
