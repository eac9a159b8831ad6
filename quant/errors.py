"""What can be wrong with what quant is given."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint folder that cannot be read or is not served; one line with file or tensor, fault and remedy."""
