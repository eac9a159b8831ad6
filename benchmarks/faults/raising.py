"""`ottava` with an op that raises: python -m benchmarks.faults.raising OP FILE once|always serve ...

Nothing happens until FILE appears. From then on the op raises at its AFTER-th call, and takes FILE away if `once`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import kernels
from service import cli

AFTER = 5
"""Calls: in the middle of a layer of a step."""


def raising(op: Callable[..., Any], trigger: Path, is_once: bool) -> Callable[..., Any]:
    """The op until the trigger is there; then it raises."""
    calls = count(1)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if trigger.exists() and next(calls) >= AFTER:
            if is_once:
                trigger.unlink()
            raise RuntimeError("planted by benchmarks.faults")
        return op(*args, **kwargs)

    return broken


def main() -> None:
    name, trigger, how = sys.argv[1:4]
    del sys.argv[1:4]
    # The command line imports what computes only when it runs: it then finds this op.
    setattr(kernels, name, raising(getattr(kernels, name), Path(trigger), how == "once"))
    cli.main()


if __name__ == "__main__":
    main()
