"""`ottava` with an op that raises: python -m benchmarks.faults.raising OP FILE once|always serve ...

Nothing happens until FILE appears. From then on the op raises at its AFTER-th call, and takes FILE away if `once`.
The op is called in the process of the engines, which this module starts in place of the service's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import kernels
from benchmarks.faults import planted

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
    """The command line, over engines whose op raises."""
    name, trigger, how = words = sys.argv[1:4]
    op = raising(getattr(kernels, name), Path(trigger), how == "once")
    planted.run("benchmarks.faults.raising", words, lambda: setattr(kernels, name, op))


if __name__ == "__main__":
    main()
