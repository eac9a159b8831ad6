"""Starts `ottava` with a fault in the process of its engines, whose module takes the place of the service's own."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial

from service import cli
from service.host import assemble
from service.host.channel.process import ProcessLink

ENGINES = "engines"
"""The word behind a module's own that tells it to be the process of the engines."""


def run(module: str, words: Sequence[str], plant: Callable[[], None]) -> None:
    """The command line of ottava after a module's words in sys.argv; in the process of its engines, plant first."""
    num_own = 1 + len(words)
    if sys.argv[num_own] == ENGINES:
        # Whoever computes is imported later, and then finds the fault.
        plant()
        del sys.argv[1 : num_own + 1]
        runpy.run_module("service.host.engine_process", run_name="__main__", alter_sys=True)
    command = [sys.executable, "-m", module, *words, ENGINES]
    vars(assemble)["ProcessLink"] = partial(ProcessLink, command=command)
    del sys.argv[1:num_own]
    cli.main()
