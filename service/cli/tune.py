"""`ottava tune`: chooses the GEMM tiles of this GPU by measurement.

They are written to $XDG_CACHE_HOME/ottava/tiles/<gpu>.json (~/.cache/ottava/tiles), which a server prefers to the
package's table. No server reads a file given by --table: it is for comparing, or for kernels/tiles/ of a checkout.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.options import takes_settings
from service.cli.terminal import progress, told_in_one_line
from service.errors import InvalidSettings
from service.later import Later
from service.settings import load_settings

COMMON_SHAPES: list[tuple[int, int, bool]] = [
    *((6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False)),  # Llama-3.1-8B
    *((4608, 3584, False), (3584, 3584, False), (37888, 3584, True), (3584, 18944, False)),  # Qwen2.5-7B
    *((15360, 5120, False), (5120, 5120, False), (27648, 5120, True), (5120, 13824, False)),  # Llama-2-13B
]
"""The fields of each `LinearShape`."""

EXAMPLES = """
Examples:
  $ ottava tune                                # once on a GPU without a table
  $ ottava tune FOLDER                         # for one model's shapes
  $ ottava tune FOLDER --tensor-parallel 2     # for those of its halves, as two GPUs multiply them
  $ ottava tune --table my-gpu.json            # measure all shapes, into a file
"""

if TYPE_CHECKING:
    import torch

    from kernels import tune as tuning
    from service.models import config as configs
    from service.models import sharding
    from service.store import resolve
else:
    configs, sharding = Later("service.models.config"), Later("service.models.sharding")
    resolve, torch, tuning = Later("service.store.resolve"), Later("torch"), Later("kernels.tune")


@takes_settings("cache_dir", "config", "tensor_parallel")
def tune(
    model: Annotated[
        str | None,
        typer.Argument(help="Model whose Linears to measure; left out: shapes of 7B to 13B models.", metavar="MODEL"),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="File to write instead of the one that servers read.", show_default="~/.cache/ottava/tiles/GPU.json"
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Choose the GEMM tiles of this GPU by measurement; shapes that are tuned already are not measured again."""
    with told_in_one_line():
        chosen = load_settings(**settings)
        if not torch.cuda.is_available():
            raise InvalidSettings("tuning measures a CUDA GPU, and none is visible here; run it where one is")
        if model is not None:
            folder = resolve.resolve_model(model, chosen.cache_dir)
            shapes = linear_shapes(configs.ModelConfig.load(folder), chosen.tensor_parallel)
        elif chosen.tensor_parallel == 1:
            shapes = [tuning.LinearShape(*shape) for shape in COMMON_SHAPES]
        else:
            raise InvalidSettings(
                f"tensor_parallel {chosen.tensor_parallel} without a model: what its ranks multiply follows from the "
                "model; name one"
            )
        with progress() as on_progress:
            choices = tuning.tune(shapes, path=table, on_progress=lambda d, n: on_progress("measuring tiles", d, n))
    for choice in choices:
        gain = choice.default_us / choice.time_us
        typer.echo(f"{choice.n}x{choice.k} T<={choice.bucket}: {choice.time_us:.1f} us, {gain:.2f}x of the default")
    if not choices:
        typer.echo("every shape is tuned already: nothing was measured")


def linear_shapes(config: configs.ModelConfig, num_ranks: int = 1) -> list[tuning.LinearShape]:
    """Those of a model's Linears as fused by the decoder; with several ranks, of each one's part.

    Raises:
        UnsupportedModel: it cannot be divided evenly among so many ranks.
    """
    sharding.refuse_uneven(config, num_ranks)
    hidden, size = config.hidden_size, config.head_size
    inner = config.intermediate_size if config.experts is None else config.experts.intermediate_size
    qkv, up = (config.num_heads + 2 * config.num_kv_heads) * size, (1 + config.layout.is_gated) * inner
    # Of gates only SiLU's is in the product's epilogue.
    is_gated = config.layout.is_gated and config.activation == "silu"
    return [
        tuning.LinearShape(qkv // num_ranks, hidden),
        tuning.LinearShape(hidden, config.num_heads * size // num_ranks),
        tuning.LinearShape(up // num_ranks, hidden, is_gated),
        tuning.LinearShape(hidden, inner // num_ranks),
    ]
