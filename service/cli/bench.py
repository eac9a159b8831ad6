"""`ottava bench`: sends load to a server, and measures what its clients see."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shlex
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.cli.chat import URL
from service.cli.options import complete, complete_list
from service.cli.terminal import LINE_EVERY_S, err, told_in_one_line
from service.errors import InvalidSettings
from service.tools.bench import report
from service.tools.bench.arrivals import Burst, Concurrency, Load, Rate
from service.tools.bench.bench import Bench, Inputs, Result
from service.tools.bench.client import Target
from service.tools.bench.dialects import ROUTES
from service.tools.bench.drive import Tally
from service.tools.bench.measure import read_slos
from service.tools.bench.prompts import Lengths, Prefixes
from service.tools.bench.sweep import Doubling, Listed, Sweep

EXAMPLES = """
Examples:
  $ ottava bench --rate 4 --goodput ttft:200 tpot:20    # Poisson arrivals
  $ ottava bench --concurrency 16 --variants w8a8,fp16
  $ ottava bench --rates 1,2,4,8 --json out.json --picture out.png
  $ ottava bench --rate 1 --sweep                       # to saturation
  $ ottava bench --burst 256 --route generate
  $ ottava bench --rate 2 --dataset questions.jsonl --route chat
  $ ottava bench --rate 8 --prefixes 4:512 --turns 3 --url http://HOST:8000

Keys: the variable OTTAVA_API_KEY, or --api-key-file. No flag takes one,
because every user of a machine can read its processes' flags.
"""

KEY_VARIABLE = "OTTAVA_API_KEY"
SECONDS = 30.0
LOAD, INPUT, OUTPUT = "Load", "What is sent", "What is reported"


def bench(
    slos: Annotated[
        list[str] | None, typer.Argument(help="More of --goodput.", metavar="[SLO]...", hidden=True)
    ] = None,
    url: Annotated[str, typer.Option(help="Address of the server.", envvar="OTTAVA_URL")] = URL,
    route: Annotated[
        str, typer.Option(help="completions or chat of OpenAI, or ottava's generate.", autocompletion=complete(ROUTES))
    ] = "completions",
    model: Annotated[
        str | None, typer.Option(help="Model to name in requests.", show_default="the server's first")
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            help="Variants of an ottava that take turns, phase by phase, and are compared.",
            autocompletion=complete_list(["w8a8", "fp16"]),
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help=f"File with the API key, or set {KEY_VARIABLE}.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until an answer must be complete.")] = 600.0,
    rate: Annotated[
        float | None, typer.Option(min=0.0001, help="Requests/s, at random times.", rich_help_panel=LOAD)
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help="Several rates, one after the other: 1,2,4.", rich_help_panel=LOAD)
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Double --rate until saturation, then bisect.", rich_help_panel=LOAD)
    ] = False,
    bisections: Annotated[int, typer.Option(min=0, help="Steps of that.", rich_help_panel=LOAD)] = 2,
    burstiness: Annotated[
        float,
        typer.Option(
            min=0.001, help="Of rates. 1: Poisson; below: in bursts; above: more even; inf: even.", rich_help_panel=LOAD
        ),
    ] = 1.0,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="So many requests at any time.", rich_help_panel=LOAD)
    ] = None,
    burst: Annotated[int | None, typer.Option(min=1, help="So many requests at once.", rich_help_panel=LOAD)] = None,
    requests: Annotated[
        int | None,
        typer.Option("--requests", min=1, help="Requests of a phase.", show_default="by time", rich_help_panel=LOAD),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Length of a phase.", rich_help_panel=LOAD)] = SECONDS,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Phases of each load.", show_default="1; 2 with --variants", rich_help_panel=LOAD),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the first phase.", rich_help_panel=LOAD)] = 4,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.", rich_help_panel=LOAD)] = 0,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.", rich_help_panel=INPUT)] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.", rich_help_panel=INPUT)] = 32,
    spread: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Lengths differ by up to this share, evenly.", rich_help_panel=INPUT),
    ] = 0.0,
    text: Annotated[bool, typer.Option("--text", help="Random words and no token ids.", rich_help_panel=INPUT)] = False,
    dataset: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines {"prompt": ...} or {"messages": \\[...]}, and "max_tokens".', rich_help_panel=INPUT
        ),
    ] = None,
    prefixes: Annotated[
        str | None, typer.Option(help="Shared system prefixes, COUNT:TOKENS.", rich_help_panel=INPUT)
    ] = None,
    turns: Annotated[
        int, typer.Option(min=1, help="Turns of a conversation, with --prefixes.", rich_help_panel=INPUT)
    ] = 1,
    no_ignore_eos: Annotated[
        bool, typer.Option("--no-ignore-eos", help="Let the model end answers early.", rich_help_panel=INPUT)
    ] = False,
    extra_body: Annotated[
        str | None, typer.Option(help="JSON object with more fields of every request.", rich_help_panel=INPUT)
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="SLOs in ms: ttft:200 tpot:20 itl:50 e2el:2000.", metavar="SLO...", rich_help_panel=OUTPUT),
    ] = None,
    max_lateness: Annotated[
        float,
        typer.Option(min=0.0, help="p99 of the generator's own delay, in ms, that is valid.", rich_help_panel=OUTPUT),
    ] = 10.0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="File for the result, with the keys of vllm bench serve.", rich_help_panel=OUTPUT),
    ] = None,
    detailed: Annotated[
        bool, typer.Option("--detailed", help="Also every request, in --json.", rich_help_panel=OUTPUT)
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="PNG file to draw; needs matplotlib.", rich_help_panel=OUTPUT)
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name of the run, in --json.", rich_help_panel=OUTPUT)] = None,
) -> None:
    """Load an OpenAI-compatible server, or ottava's /generate, and measure what clients see.

    Arrivals are drawn beforehand and wait for no answer. The generator tells how late it was itself.
    """
    with told_in_one_line():
        if route not in ROUTES:
            raise InvalidSettings(f"--route {route!r} is none of {', '.join(ROUTES)}")
        names = _names(route, model, variants)
        load, rising = _load(rate, rates, concurrency, burst, burstiness, sweep, bisections)
        run = Bench(
            target=Target.parse(url, _key(api_key_file)),
            route=route,
            names=names,
            load=load,
            sweep=rising,
            burstiness=burstiness,
            count=burst if burst is not None else requests,
            seconds=seconds,
            rounds=rounds or (1 if variants is None else 2),
            seed=seed,
            inputs=Inputs(Lengths(input_len, output_len, spread), dataset, _prefixes(prefixes, turns), not text),
            slos=read_slos(
                [word for given in (*(goodput or ()), *(slos or ())) for word in given.replace(",", " ").split()]
            ),
            timeout_s=timeout,
            max_lateness_ms=max_lateness,
            warmup=warmup,
            extra=_extra(extra_body, ignores_eos=not no_ignore_eos),
            json_file=json_file,
            picture=picture,
        )
        with Line() as line:
            result = asyncio.run(run.run(line))
        _write(result, label, is_detailed=detailed)
    # A pipe has no width, and a row takes up to 150 characters.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for shown in report.tables(result):
        if isinstance(shown, Table):
            console.print(shown)
        else:
            console.print(escape(shown), highlight=False, soft_wrap=True)


class Line:
    """How far a phase is, on stderr: on a terminal in one line that changes, elsewhere in one every LINE_EVERY_S.

    Written directly, since a thread that redraws would keep the event loop from its sockets.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._stage = ""
        self._said_s = -math.inf

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal and self._stage:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __call__(self, stage: str, tally: Tally) -> None:
        now_s = time.monotonic()
        if not self._is_terminal and stage == self._stage and now_s - self._said_s < LINE_EVERY_S:
            return
        self._stage, self._said_s = stage, now_s
        total = "" if tally.total is None else f" of {tally.total}"
        speed = tally.tokens / tally.elapsed_s if tally.elapsed_s else 0.0
        told = (
            f"{stage}: {tally.elapsed_s:.0f} s, {tally.sent}{total} sent, {tally.in_flight} in flight, "
            f"{tally.failed} failed, {speed:.0f} tokens/s, late {tally.last_late_ms:.1f} ms"
        )
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{told[: err.width - 1]}")
            sys.stderr.flush()
        else:
            err.print(f"ottava: {escape(told)}", highlight=False, soft_wrap=True)


def _names(route: str, model: str | None, variants: str | None) -> tuple[str, ...]:
    if variants is not None and model is not None:
        raise InvalidSettings("--variants and --model contradict each other: variants are the models of an ottava")
    if route == "generate" and model is not None:
        raise InvalidSettings("/generate takes no --model; name its variant with --variants")
    if variants is None:
        return () if model is None else (model,)
    names = tuple(dict.fromkeys(name.strip() for name in variants.split(",")))
    if not all(names):
        raise InvalidSettings(f"--variants {variants!r} has an empty name; write w8a8,fp16")
    return names


def _load(
    rate: float | None,
    rates: str | None,
    concurrency: int | None,
    burst: int | None,
    burstiness: float,
    sweep: bool,
    bisections: int,
) -> tuple[Load | None, Sweep | None]:
    """The one load that was asked for, or a sweep."""
    given = {"--rate": rate, "--rates": rates, "--concurrency": concurrency, "--burst": burst}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InvalidSettings(f"exactly one of {', '.join(given)} is needed, not {' and '.join(named) or 'none'}")
    if sweep and rate is None:
        raise InvalidSettings("--sweep starts at --rate; add it, or list the --rates")
    if rates is not None:
        return None, Listed(_numbers(rates))
    if rate is not None:
        return (None, Doubling(rate, bisections)) if sweep else (Rate(rate, burstiness), None)
    return (Concurrency(concurrency), None) if concurrency is not None else (Burst(), None)


def _numbers(rates: str) -> list[float]:
    try:
        found = [float(word) for word in rates.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < math.inf for rate in found):
        raise InvalidSettings(f"--rates {rates!r} is no list of rates above 0; write 1,2,4")
    return found


def _prefixes(prefixes: str | None, turns: int) -> Prefixes | None:
    if prefixes is None:
        if turns > 1:
            raise InvalidSettings("--turns needs --prefixes COUNT:TOKENS, whose conversations have them")
        return None
    count, _, tokens = prefixes.partition(":")
    if not (count.isdigit() and tokens.isdigit() and int(count) and int(tokens)):
        raise InvalidSettings(f"--prefixes {prefixes!r} is not COUNT:TOKENS, such as 4:512")
    return Prefixes(int(count), int(tokens), turns)


def _extra(extra_body: str | None, *, ignores_eos: bool) -> dict[str, Any]:
    fixed: dict[str, Any] = {"temperature": 0} | ({"ignore_eos": True} if ignores_eos else {})
    if extra_body is None:
        return fixed
    try:
        extra = json.loads(extra_body)
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise InvalidSettings(f"--extra-body {extra_body!r} is no JSON object, such as '{{\"temperature\": 0.7}}'")
    return fixed | extra


def _key(file: Path | None) -> str | None:
    if file is not None:
        return file.read_text(encoding="utf-8").strip()
    return os.environ.get(KEY_VARIABLE) or None


def _write(result: Result, label: str | None, *, is_detailed: bool) -> None:
    bench = result.bench
    command = shlex.join(["ottava", *sys.argv[1:]])
    document = report.document(result, command, label=label, is_detailed=is_detailed)
    if bench.json_file is not None:
        bench.json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if bench.picture is not None:
        # Imported only here: matplotlib belongs to an extra, and its import must not delay other commands.
        import_module("service.tools.bench.picture").draw(document, bench.picture)
