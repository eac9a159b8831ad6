"""The sink of a checkpoint: the tokens that every text begins with, as the float model computes them.

In most models the first token of a text has activations a thousand times as large as any other's, and all later tokens
attend to it. A scale that tokens share is spoiled by it. So its keys and values are kept as the float model has them,
and it goes through no int8 product.

Source: Massive Activations in Large Language Models (arXiv 2402.17762); PrefixQuant (arXiv 2410.05265).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quant.checkpoint.safetensors_files import cast, save_tensors
from quant.errors import CheckpointError

SINK_NAME = "ottava.sink"
"""A safetensors file by another ending: readers that take every *.safetensors of a folder know no such tensors."""


@dataclass(frozen=True, slots=True, eq=False)
class Sink:
    """The S tokens that every text begins with.

    ids: the tokens.
    qkv: of each layer, [S, (H + 2G) D]: what its Linears of queries, keys and values give, side by side as they stand
        in the checkpoint, biases added, before any norm or rotation.
    hidden: [S, hidden_size], the last layer's output, before the last norm.
    """

    ids: tuple[int, ...]
    qkv: tuple[Tensor, ...]
    hidden: Tensor

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write it, with floats in dtype."""
        tensors = {"hidden": cast(self.hidden, dtype, "hidden")}
        tensors |= {_layer(index): cast(qkv, dtype, _layer(index)) for index, qkv in enumerate(self.qkv)}
        save_tensors(tensors, folder / SINK_NAME)

    @classmethod
    def load(cls, folder: Path, ids: Sequence[int], dtype: torch.dtype, device: torch.device) -> Sink:
        """Read the sink of a checkpoint that its notes say are these tokens, with floats in dtype on device.

        Raises:
            CheckpointError: there is none, or it is damaged or of other tokens.
        """
        path = folder / SINK_NAME
        try:
            tensors = load_file(path)
            hidden = tensors.pop("hidden")
            qkv = [tensors[_layer(index)] for index in range(len(tensors))]
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{path}: {error}; {folder} was quantized with the first tokens in float, which are in that file; "
                "quantize the float model again"
            ) from error
        wrong = next(
            (t for t in (hidden, *qkv) if t.ndim != 2 or len(t) != len(ids) or not t.is_floating_point()), None
        )
        if wrong is not None:
            raise CheckpointError(
                f"{path}: a tensor is {wrong.dtype} {list(wrong.shape)}, expected floats for {len(ids)} tokens; "
                "quantize the float model again"
            )
        moved = [cast(tensor, dtype, SINK_NAME).to(device) for tensor in (hidden, *qkv)]
        return cls(tuple(ids), tuple(moved[1:]), moved[0])


def _layer(index: int) -> str:
    return f"layers.{index}.qkv"
