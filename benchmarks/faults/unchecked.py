"""`ottava` whose engines take weights that are not finite: python -m benchmarks.faults.unchecked serve ...

As if they had gone bad in memory, after they were read and found in order.
"""

from __future__ import annotations

from benchmarks.faults import planted
from quant.checkpoint import reader


def plant() -> None:
    """Every tensor that is read counts as finite."""
    vars(reader)["largest"] = lambda _: 0.0


if __name__ == "__main__":
    planted.run("benchmarks.faults.unchecked", (), plant)
