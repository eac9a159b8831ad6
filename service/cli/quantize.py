"""`ottava quantize`: converts a float model to an int8 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.options import RoundingOfWeights, complete, scheme_of, takes_settings
from service.cli.terminal import progress, told_in_one_line
from service.errors import InvalidSettings
from service.later import Later
from service.settings import INT8_SCHEMES, load_settings

EXAMPLES = """
Examples:
  $ ottava quantize demo /tmp/demo-w8a8
  $ ottava quantize meta-llama/Llama-3.1-8B-Instruct OUT --scheme zeroquant
  $ ottava quantize FOLDER OUT --calibration text.txt --alpha 0.5
  $ ottava serve OUT --baseline FOLDER        # then
"""

NOT_LOADED_ELSEWHERE = ("gpt2", "qwen3_moe")
ALONE = "transformers does not load {family} in int8: its Linears there are of another kind than in the checkpoint"

if TYPE_CHECKING:
    from service.host import machine
    from service.models import config, devices
    from service.store import calibration, quantized, resolve, sink
else:
    machine, devices = Later("service.host.machine"), Later("service.models.devices")
    config = Later("service.models.config")
    calibration, quantized = Later("service.store.calibration"), Later("service.store.quantized")
    resolve, sink = Later("service.store.resolve"), Later("service.store.sink")


@takes_settings(
    "alpha", "sink", "rotate", "kv_cache", "calibration", "calibration_windows", "seed", "cache_dir", "device", "config"
)
def quantize(
    model: Annotated[str, typer.Argument(help="Model folder or Hugging Face id; `demo` for the demo model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    scheme: Annotated[
        str, typer.Option(help="One of: " + ", ".join(INT8_SCHEMES), autocompletion=complete(INT8_SCHEMES))
    ] = "w8a8",
    rounding: RoundingOfWeights = None,
    **settings: Any,
) -> None:
    """Write MODEL as a W8A8 checkpoint (compressed-tensors).

    Which schemes and families transformers and vLLM load as well is told at the end, and in docs/schemes.md.
    """
    with told_in_one_line():
        machine.quiet_libraries()
        chosen = load_settings(**settings)
        recipe = scheme_of(scheme, chosen.alpha, rounding).with_kv(chosen.kv)
        if not recipe.is_int8:
            raise InvalidSettings(f"scheme {scheme!r} is float: there is nothing to quantize")
        with progress() as on_progress:
            name = None if model == "demo" else model
            source = resolve.resolve_model(name, chosen.cache_dir, lambda stage: on_progress(stage, 0, 0))
            ranges_from = calibration.Calibration(chosen.calibration, chosen.seed, chosen.calibration_windows)
            device = devices.pick_device(chosen.device)
            recipe = sink.with_options(source, recipe, chosen)
            quantized.quantize_model(source, out, recipe, ranges_from, device, on_progress=on_progress)
    typer.echo(f"{out}: {recipe.name}, {recipe.describe()}")
    family = config.ModelConfig.load(source).family
    limits = (recipe.elsewhere, ALONE if family in NOT_LOADED_ELSEWHERE else None)
    for limit in limits:
        if limit is not None:
            typer.echo(f"note: {limit.format(family=family)}; ottava serves it as described")
