"""The command line: `ottava serve`, `cluster`, `chat`, `bench`, `quantize`, `evaluate`, `tune`, `roofline`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from quant import __version__
from service.cli import bench, chat, cluster, evaluate, quantize, roofline, serve, tune

EXAMPLES = """
Start here: two terminals, no GPU and no model needed.
  $ ottava serve              # the demo model; page: http://127.0.0.1:8000/
  $ ottava chat --compare     # INT8 and FP16 answer in turn
  $ ottava bench --concurrency 4 --variants w8a8,fp16      # under load

Then your own model:
  $ ottava evaluate FOLDER --schemes w8a8,rtn     # compare schemes' quality
  $ ottava quantize FOLDER OUT --scheme w8a8      # a checkpoint to keep
  $ ottava serve OUT --baseline FOLDER
  $ ottava roofline llama-3.1-8b --gpu h100       # predict the speedup

`ottava COMMAND --help` shows a command's options with examples;
`ottava --install-completion` enables shell completion.
"""

app = typer.Typer(
    name="ottava",
    help="Serve language models in INT8 W8A8, measured live against their FP16 baseline.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for module, command in (
    (serve, serve.serve),
    (cluster, cluster.cluster),
    (chat, chat.chat),
    (bench, bench.bench),
    (quantize, quantize.quantize),
    (evaluate, evaluate.evaluate),
    (tune, tune.tune),
    (roofline, roofline.roofline),
):
    app.command(epilog=module.EXAMPLES)(command)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        typer.echo(f"ottava {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `ottava` command."""
    # Otherwise tokenizers' thread pool could deadlock after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app(prog_name="ottava")
