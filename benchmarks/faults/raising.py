"""`ottava` with an op that raises: python -m benchmarks.faults.raising OP FILE once|always serve ...

Nothing happens until FILE appears. From then on the op raises at its AFTER-th call, and takes FILE away if `once`.
The op is called in the process of the engines, which this module starts in place of the service's own.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import kernels
from service import cli
from service.host import assemble
from service.host.channel.process import ProcessLink

AFTER = 5
"""Calls: in the middle of a layer of a step."""

ENGINES = "engines"


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
    """The command line; or the process of its engines, where the word after `how` is ENGINES."""
    name, trigger, how, what = sys.argv[1:5]
    if what == ENGINES:
        # Whoever computes is imported later, and then finds this op.
        setattr(kernels, name, raising(getattr(kernels, name), Path(trigger), how == "once"))
        del sys.argv[1:5]
        runpy.run_module("service.host.engine_process", run_name="__main__", alter_sys=True)
    command = [sys.executable, "-m", "benchmarks.faults.raising", name, trigger, how, ENGINES]
    vars(assemble)["ProcessLink"] = partial(ProcessLink, command=command)
    del sys.argv[1:4]
    cli.main()


if __name__ == "__main__":
    main()
