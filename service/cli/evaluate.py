"""`ottava evaluate`: measures the quality and speed of quantization schemes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from quant.scheme import PRESETS, KVStorage
from service.cli.options import Model, RoundingOfWeights, complete, complete_list, scheme_of, takes_settings
from service.cli.terminal import progress, told_in_one_line
from service.later import Later
from service.settings import load_settings

EXAMPLES = """
Examples:
  $ ottava evaluate --schemes w8a8,rtn --windows 4
  $ ottava evaluate FOLDER --schemes w8a8 --kv-cache both --layers
  $ ottava evaluate INT8_FOLDER --baseline FOLDER   # what was quantized before, by ottava or another tool
  $ ottava evaluate FOLDER --text text.txt --json out.json --plot out.png
"""

if TYPE_CHECKING:
    from service.host import machine
    from service.tools.evaluate import evaluation, report
else:
    machine, evaluation = Later("service.host.machine"), Later("service.tools.evaluate.evaluation")
    report = Later("service.tools.evaluate.report")


@takes_settings(
    "baseline",
    "alpha",
    "sink",
    "rotate",
    "calibration",
    "calibration_windows",
    "dtype",
    "device",
    "seed",
    "cache_dir",
    "config",
)
def evaluate(
    model: Model = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            help=f"Presets, separated by commas, of {', '.join(PRESETS)}.",
            show_default="all",
            autocompletion=complete_list(PRESETS),
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure on.", show_default="Python's help topics")
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(help='Multiple choice: JSON lines {"question": text, "choices": \\[text, ...], "answer": index}.'),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List the error of every Linear and layer.")] = False,
    rounding: RoundingOfWeights = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Storage of int8 schemes' keys and values: auto (as in the scheme), float, int8, or both in turn.",
            show_default="auto",
            autocompletion=complete(["auto", "float", "int8", "both"]),
        ),
    ] = None,
    quantize_head: Annotated[
        bool, typer.Option("--quantize-head", help="Measure int8 schemes with an int8 head too.")
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = 20,
    window_len: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw; needs matplotlib.")] = None,
    **settings: Any,
) -> None:
    """Compare the quality and speed of schemes with the float model's, on the int8 path."""
    with told_in_one_line():
        machine.quiet_libraries()
        chosen = load_settings(model=model, kv_cache=None if kv_cache == "both" else kv_cache, **settings)
        # None for all: in a folder that is quantized already there is one, and it cannot be chosen.
        unchosen = (schemes, chosen.alpha, rounding, chosen.sink, chosen.rotate) == (None, None, None, "auto", False)
        names = ",".join(PRESETS) if schemes is None else schemes
        recipes = [scheme_of(name, chosen.alpha, rounding) for name in names.split(",")]
        storages: tuple[KVStorage | None, ...] = ("float", "int8") if kv_cache == "both" else (chosen.kv,)
        asked = evaluation.Evaluation(
            None if unchosen else recipes,
            storages,
            ("float", "int8") if quantize_head else ("float",),
            text,
            choices,
            windows,
            window_len,
            chosen.calibration_windows,
            layers,
            json_file,
            plot,
        )
        with progress() as on_progress:
            run, rows = asked.run(
                chosen.model,
                chosen,
                on_progress,
                ["ottava", *sys.argv[1:]],
                lambda row: typer.echo(report.line(row)),
            )
    # A pipe has no width, and a scheme's name and eight columns take up to 120 characters.
    evaluation.show(run, rows, Console() if sys.stdout.isatty() else Console(width=120))
