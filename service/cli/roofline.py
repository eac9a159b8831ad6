"""`ottava roofline`: predicts the best possible speed on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from quant.analysis.feasibility import explain, parse_scheme
from quant.analysis.gpus import GPUS
from quant.analysis.roofline import SHAPES
from quant.errors import InvalidScheme
from service.cli.options import complete
from service.cli.terminal import err, told_in_one_line
from service.errors import InvalidSettings
from service.later import Later

EXAMPLES = """
Examples:
  $ ottava roofline llama-3.1-8b --gpu h100 --tokens 1,16,256
  $ ottava roofline FOLDER --gpu l4 --json roofline.json
  $ ottava roofline llama-3.1-70b --gpus 4 --tokens 1,64,2048
  $ ottava roofline llama-3.1-8b --scheme weight=channel,activation=token
"""

if TYPE_CHECKING:
    from service.tools import roofline as reports
else:
    reports = Later("service.tools.roofline")


def roofline(
    model: Annotated[
        str,
        typer.Argument(help=f"Model folder, Hugging Face id, or {', '.join(SHAPES)}.", autocompletion=complete(SHAPES)),
    ],
    gpu: Annotated[str, typer.Option(help="One of: " + ", ".join(GPUS), autocompletion=complete(GPUS))] = "h100",
    tokens: Annotated[str, typer.Option(help="Tokens of a step, separated by commas.")] = "1,16,256,4096",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache of each request, or of a prompt.")] = 512,
    decodes: Annotated[int, typer.Option(min=0, help="Steps up to this size decode; larger ones prefill.")] = 256,
    bandwidth: Annotated[
        str,
        typer.Option(
            help="data-sheet, measured (by a copy; h100 only), or TB/s.",
            autocompletion=complete(["data-sheet", "measured"]),
        ),
    ] = "data-sheet",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the model (tensor parallelism).")] = 1,
    link: Annotated[
        str,
        typer.Option(
            help="Between GPUs: data-sheet, or GB/s in one direction.", autocompletion=complete(["data-sheet"])
        ),
    ] = "data-sheet",
    scheme: Annotated[
        str | None, typer.Option(help="Check that a scheme is practical, such as weight=channel,activation=token.")
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Result of benchmarks.kernels or benchmarks.serving to compare with.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the rows to.")] = None,
) -> None:
    """Predict the times of MODEL's Linears and steps in FP16 and INT8 from operations and bytes."""
    with told_in_one_line():
        _refuse_impractical(scheme)
        shape, roofs = reports.find_shape(model), reports.find_gpu(gpu, bandwidth, link)
        reports.refuse_uneven(shape, gpus)
        steps = reports.read_steps(tokens, context, decodes)
        found = reports.read_measured(measured or [], shape, roofs, steps, gpus)
        report = reports.Report(shape, roofs, steps, found, gpus)
        if json_file is not None:
            json_file.write_text(report.as_json(), encoding="utf-8")
    # A pipe has no width, and a line with measured times takes 94 columns.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    for table in reports.tables(report):
        console.print(table)
    console.print(reports.summary(report), highlight=False)


def _refuse_impractical(scheme: str | None) -> None:
    """Print why a scheme is practical, or print why not and exit with 2."""
    if scheme is None:
        return
    try:
        verdict = explain(**parse_scheme(scheme))
    except InvalidScheme as error:
        raise InvalidSettings(str(error)) from error
    if not verdict.is_practical:
        err.print(escape(verdict.reason), highlight=False, soft_wrap=True)
        raise typer.Exit(2)
    Console().print(escape(verdict.reason), highlight=False, soft_wrap=True)
