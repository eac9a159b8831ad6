"""The command line: `ottava serve`, `quantize`, `evaluate`, `tune`, `roofline`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
import uvicorn
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

from kernels import __version__
from kernels.tune import tune as measure_tiles
from quant.checkpoint import CheckpointError
from quant.gpus import GPUS
from quant.practical import explain, parse_scheme
from quant.roofline import SHAPES
from quant.scheme import PRESETS, Rounding, Scheme
from service.app import create_app
from service.errors import InvalidSettings, StartupError
from service.evaluating import Evaluation, in_storages, show
from service.hosting import Host, open_host
from service.models.families import ModelConfig
from service.models.loader import pick_device
from service.models.prepare import Calibration, quantize_model, resolve_model
from service.roofline import Report, find_gpu, find_shape, read_measured, read_steps, summary, tables
from service.settings import Settings, load_settings

COMMON_SHAPES = [
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),  # Llama-3.1-8B
    *((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),  # Qwen2.5-7B
    *((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),  # Llama-2-13B
]

app = typer.Typer(
    name="ottava",
    help="Serve language models in INT8 W8A8, measured live against their FP16 baseline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True)

Model = Annotated[
    str | None,
    typer.Argument(help="Model folder or Hugging Face id; left out: the demo model (SmolLM2-135M-Instruct)."),
]
Alpha = Annotated[
    float | None, typer.Option(help="SmoothQuant's migration strength, 0 to 1; default: searched for each group.")
]
CalibrationText = Annotated[
    Path | None,
    typer.Option("--calibration", help="UTF-8 text to calibrate on; default: self-written, for large models Python's."),
]
RoundingOfWeights = Annotated[
    str | None, typer.Option("--rounding", help="Of weights: nearest or gptq; default: the scheme's.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of self-written calibration text and of random weights.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where prepared models are kept.")]
KVCache = Annotated[
    str | None, typer.Option(help="Keys and values of int8 schemes: auto (what the scheme says), float or int8.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float16, bfloat16 or float32.")]


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        typer.echo(f"ottava {__version__}")
        raise typer.Exit


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; default 8000.")] = None,
    variants: Annotated[str | None, typer.Option(help="Default w8a8,fp16; the first is a request's default.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Float model, where MODEL is quantized already.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Quantization preset of w8a8; default w8a8.")] = None,
    alpha: Alpha = None,
    calibration: CalibrationText = None,
    dtype: Dtype = None,
    device: Device = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")] = None,
    max_num_requests: Annotated[int | None, typer.Option(help="Requests that share a step.")] = None,
    max_batched_tokens: Annotated[int | None, typer.Option(help="Tokens computed per step.")] = None,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Memory of one variant's KV cache.")] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="Keys and values of w8a8: auto (what MODEL or the scheme says), float or int8; fp16: float."),
    ] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may queue.")] = None,
    random_weights: Annotated[
        bool | None, typer.Option("--random-weights", help="Random weights of MODEL's shapes, for speed tests.")
    ] = None,
    seed: Seed = None,
    cache_dir: CacheDir = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve MODEL over HTTP, W8A8 beside its baseline.

    Every option is also a variable: --max-model-len is OTTAVA_MAX_MODEL_LEN.
    """
    options = {name: value for name, value in locals().items() if value is not None}
    with _told_in_one_line():
        settings = load_settings(**options)
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        with _progress_bars() as on_progress:
            hosted = open_host(settings, on_progress)
    err.print(_panel(hosted, settings))
    try:
        application = create_app(hosted.engines, settings, hosted.tokenizer, hosted.info, hosted.self_check)
        uvicorn.run(application, host=settings.host, port=settings.port, log_level=settings.log_level)
    finally:
        hosted.stop()


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Model folder or Hugging Face id; `demo` for the demo model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    scheme: Annotated[str, typer.Option(help="One of: " + ", ".join(n for n, s in PRESETS.items() if s.is_int8))] = (
        "w8a8"
    ),
    alpha: Alpha = None,
    rounding: RoundingOfWeights = None,
    kv_cache: KVCache = None,
    calibration: CalibrationText = None,
    seed: Seed = None,
    cache_dir: CacheDir = None,
    device: Device = None,
) -> None:
    """Write MODEL as a W8A8 checkpoint (compressed-tensors) that ottava, transformers and vLLM load."""
    with _told_in_one_line():
        settings = load_settings(
            kv_cache=kv_cache, calibration=calibration, seed=seed, cache_dir=cache_dir, device=device
        )
        recipe = _scheme(scheme, alpha, rounding).with_kv(settings.kv)
        if not recipe.is_int8:
            raise InvalidSettings(f"scheme {scheme!r} is float: there is nothing to quantize")
        with _progress_bars() as on_progress:
            name = None if model == "demo" else model
            source = resolve_model(name, settings.cache_dir, lambda stage: on_progress(stage, 0, 0))
            ranges_from = Calibration(settings.calibration, settings.seed)
            quantize_model(source, out, recipe, ranges_from, pick_device(settings.device), on_progress)
    typer.echo(f"{out}: {recipe.name}, {recipe.describe()}")


@app.command()
def evaluate(
    model: Model = None,
    schemes: Annotated[str, typer.Option(help="Presets, separated by commas.")] = ",".join(PRESETS),
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on; default: Python's help topics.")] = None,
    choices: Annotated[
        Path | None,
        typer.Option(help='Multiple choice: JSON lines {"question": text, "choices": \\[text, ...], "answer": index}.'),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List the error of every Linear and layer.")] = False,
    alpha: Alpha = None,
    rounding: RoundingOfWeights = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Keys and values of int8 schemes: auto (what the scheme says), float, int8, or both in turn."
        ),
    ] = None,
    calibration: CalibrationText = None,
    calibration_windows: Annotated[int, typer.Option(min=1, help="Windows read to calibrate.")] = 8,
    windows: Annotated[int, typer.Option(min=1, help="Windows measured.")] = 20,
    window_len: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = None,
    cache_dir: CacheDir = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write run and rows to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw; needs matplotlib.")] = None,
) -> None:
    """Measure what schemes cost in quality against the float model, and what they bring, on the int8 path."""
    with _told_in_one_line():
        settings = load_settings(
            model=model,
            kv_cache=None if kv_cache == "both" else kv_cache,
            calibration=calibration,
            seed=seed,
            cache_dir=cache_dir,
            dtype=dtype,
            device=device,
        )
        chosen = [_scheme(name, alpha, rounding) for name in schemes.split(",")]
        compared = in_storages(chosen, ("float", "int8") if kv_cache == "both" else (settings.kv,))
        evaluation = Evaluation(
            compared, text, choices, windows, window_len, calibration_windows, layers, json_file, plot
        )
        with _progress_bars() as on_progress:
            run, rows = evaluation.run(model, settings, on_progress, ["ottava", *sys.argv[1:]])
    # A pipe has no width; a scheme's name and eight columns take up to 120.
    show(run, rows, Console() if sys.stdout.isatty() else Console(width=120))


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Argument(help="Model whose Linears are measured; default: shapes of 7B to 13B models.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Table to write; default: this GPU's, in the package.")] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Choose the GEMM tiles of this GPU by measurement; what its table holds already is kept."""
    with _told_in_one_line():
        settings = load_settings(cache_dir=cache_dir)
        if not torch.cuda.is_available():
            raise InvalidSettings("tuning measures a CUDA GPU, and none is visible here")
        shapes = COMMON_SHAPES if model is None else _linear_shapes(resolve_model(model, settings.cache_dir))
        with _progress_bars() as on_progress:
            choices = measure_tiles(shapes, path=table, on_progress=lambda d, n: on_progress("measuring tiles", d, n))
    for choice in choices:
        gain = choice.default_us / choice.time_us
        typer.echo(f"{choice.n}x{choice.k} T<={choice.bucket}: {choice.time_us:.1f} us, {gain:.2f}x of the default")


@app.command()
def roofline(
    model: Annotated[str, typer.Argument(help=f"Model folder, Hugging Face id, or {', '.join(SHAPES)}.")],
    gpu: Annotated[str, typer.Option(help="One of: " + ", ".join(GPUS))] = "h100",
    tokens: Annotated[str, typer.Option(help="Tokens of a step, separated by commas.")] = "1,16,256,4096",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache of each request, or of a prompt.")] = 512,
    decodes: Annotated[int, typer.Option(min=0, help="Steps up to this size decode; larger ones read prompts.")] = 256,
    bandwidth: Annotated[str, typer.Option(help="data-sheet, measured (a copy; h100 alone), or TB/s.")] = "data-sheet",
    scheme: Annotated[
        str | None, typer.Option(help="Say whether weight=GRANULARITY,activation=GRANULARITY is practical.")
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Result of benchmarks.kernels or benchmarks.serving to set beside.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the rows to.")] = None,
) -> None:
    """Predict the time of MODEL's Linears and steps in FP16 and INT8 from operations and bytes alone."""
    with _told_in_one_line():
        _refuse_impractical(scheme)
        shape, roofs = find_shape(model), find_gpu(gpu, bandwidth)
        steps = read_steps(tokens, context, decodes)
        report = Report(shape, roofs, steps, read_measured(measured or [], shape, roofs, steps))
        if json_file is not None:
            json_file.write_text(report.as_json(), encoding="utf-8")
    # A pipe has no width; with measured times beside the predicted ones a line takes 94 columns.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    for table in tables(report):
        console.print(table)
    console.print(summary(report), highlight=False)


def main() -> None:
    """Entry point of the `ottava` command."""
    # The model is on disk by now or fetched by name: nothing else may reach out, and no fork may deadlock tokenizers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    app(prog_name="ottava")


def _scheme(name: str, alpha: float | None, rounding: str | None) -> Scheme:
    """A preset; alpha replaces the presets' own where they smooth, rounding where they are int8."""
    try:
        return Scheme.preset(name.strip()).with_alpha(alpha).with_rounding(cast("Rounding | None", rounding))
    except ValueError as error:
        raise InvalidSettings(str(error)) from error


def _linear_shapes(folder: Path) -> list[tuple[int, int]]:
    """(N, K) of the Linears of a model as the decoder fuses them."""
    config = ModelConfig.load(folder)
    hidden, size = config.hidden_size, config.head_size
    inner = config.intermediate_size if config.experts is None else config.experts.intermediate_size
    qkv, up = (config.num_heads + 2 * config.num_kv_heads) * size, (1 + config.layout.is_gated) * inner
    return [(qkv, hidden), (hidden, config.num_heads * size), (up, hidden), (hidden, inner)]


def _refuse_impractical(scheme: str | None) -> None:
    """Say why a scheme written by hand is practical, or why not and exit with 2."""
    if scheme is None:
        return
    try:
        verdict = explain(**parse_scheme(scheme))
    except ValueError as error:
        raise InvalidSettings(str(error)) from error
    if not verdict.is_practical:
        err.print(escape(verdict.reason), highlight=False, soft_wrap=True)
        raise typer.Exit(2)
    Console().print(escape(verdict.reason), highlight=False, soft_wrap=True)


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Turn an error that the user can mend into one line on stderr and exit code 1."""
    try:
        yield
    except (StartupError, CheckpointError, OSError, torch.OutOfMemoryError) as error:
        # Brackets of a path or a shape are text, not markup, and a library's message can have several lines.
        message = escape(" ".join(line.strip() for line in str(error).splitlines()))
        err.print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def _progress_bars() -> Iterator[Any]:
    """A bar per stage on stderr; stages without a length pulse."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=err, disable=not sys.stderr.isatty()) as progress:
        tasks: dict[str, Any] = {}

        def on_progress(stage: str, done: int, total: int, detail: str = "", /) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    progress.update(task, total=1, completed=1)
                tasks[stage] = progress.add_task(stage, total=total or None, detail="")
            counted = f"{done} of {total}, {detail}" if detail else ""
            progress.update(tasks[stage], completed=done, detail=counted)

        yield on_progress
        for task in progress.tasks:
            progress.update(task.id, total=task.total or 1, completed=task.total or 1)


def _panel(hosted: Host, settings: Settings) -> Panel:
    info = hosted.info()
    lines = [f"model     {info['model']} ({info['family']}), up to {info['max_model_len']} tokens", ""]
    for name, variant in hosted.variants.items():
        scheme = variant.notes.get("description") or "float weights and activations."
        kv = f"{variant.runner.kv_cache_bytes / 1e6:.0f} MB {variant.decoder.kv_dtype} KV".replace("torch.", "")
        memory = f"{variant.decoder.weight_bytes / 1e6:.0f} MB weights, {kv}"
        lines.append(f"{name:<9} {variant.engine.dtype}, {memory}: {scheme}")
    url = f"http://{settings.host}:{settings.port}"
    lines += ["", f"device    {info['device']}", f"endpoints {url}/generate  /metrics  /health  /ready  /info  /docs"]
    return Panel("\n".join(lines), title=f"ottava {__version__}", title_align="left")
