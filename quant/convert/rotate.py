"""Rotation: the residual stream in another basis, in which no channel stands out, folded into the weights.

With an orthogonal R [H, H] the stream x becomes x R: what writes to it is multiplied by R, what reads it by R^T, and
R R^T = 1. Lengths stay, so an RMSNorm does the same once its weight is folded into its readers. Within each head values
are rotated too, and the output projection back. The function stays as it is and costs nothing at run time.

Source: QuaRot (arXiv 2404.00456), sections 4.1 and 4.2; SpinQuant (arXiv 2405.16406), whose R1 and R2 these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from quant.checkpoint.safetensors_files import TensorFiles
from quant.part import Ranges

SEED = 0
"""Of the rotations' random signs, so that a checkpoint's rotation is known from its width."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The modules around the residual stream of a model whose norms are RMSNorms before its branches, by name.

    embedding, norm, head: the token embedding, the last norm and the head.
    readers: Linears that read the stream, a router too, each with the norm before it.
    writers: Linears whose output is added to the stream.
    values: Linears whose outputs from a row on are values, and that row.
    outputs: Linears that read attention's heads side by side.
    head_size: D.
    norm_offset: what the model adds to a norm's stored weight.
    """

    embedding: str
    norm: str
    head: str
    readers: Mapping[str, str]
    writers: frozenset[str]
    values: Mapping[str, int]
    outputs: frozenset[str]
    head_size: int
    norm_offset: float = 0.0


@cache
def rotation(width: int) -> Tensor:
    """An orthogonal matrix [width, width], float32: a Hadamard matrix with random signs.

    If width is no power of two, its odd part is a random orthogonal matrix, and R the Kronecker product of both.
    """
    generator = torch.Generator().manual_seed(SEED)
    power = width & -width
    odd = torch.randn(width // power, width // power, generator=generator, dtype=torch.float64)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    signs = torch.randint(2, (width, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return (signs * torch.kron(torch.linalg.qr(odd).Q.contiguous(), hadamard / power**0.5)).float()


def opener(stream: Stream | None) -> Callable[[Path], TensorFiles]:
    """What opens a float folder's tensors: rotated, or as they are without a stream."""
    return TensorFiles if stream is None else partial(RotatedFiles, stream=stream)


class RotatedFiles(TensorFiles):
    """The tensors of a float folder as they are after the rotation, in float32 where they change.

    A head that is tied to the embedding is one of its own then: the last norm's weight is folded into it alone.
    """

    def __init__(self, folder: Path, stream: Stream) -> None:
        super().__init__(folder)
        self._stream = stream
        self._norms = {stream.norm, *stream.readers.values()}
        self._head = f"{stream.head}.weight"
        self.names = sorted({*self.names, self._head})

    def __contains__(self, name: str) -> bool:
        return name == self._head or super().__contains__(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorFiles`."""
        return super().shape(self._origin(name))

    def get(self, name: str, rows: Ranges | None = None, columns: Ranges | None = None) -> Tensor:
        """See `TensorFiles`. Whole tensors alone."""
        assert rows is None
        assert columns is None
        module, _, kind = name.rpartition(".")
        stored, stream = super().get(self._origin(name)), self._stream
        if module in self._norms:
            return torch.full_like(stored, 1.0 - stream.norm_offset, dtype=torch.float32)
        if module == stream.embedding:
            return stored.float() @ rotation(stored.shape[1])
        if module == stream.head:
            return self._read_behind(stored, stream.norm)
        changed = stored
        if module in stream.readers and kind == "weight":
            changed = self._read_behind(changed, stream.readers[module])
        if module in stream.values:
            changed = self._rotated_values(changed, stream.values[module])
        if module in stream.outputs and kind == "weight":
            heads = changed.float().reshape(len(changed), -1, stream.head_size)
            changed = (heads @ rotation(stream.head_size)).flatten(1)
        if module in stream.writers:
            turn = rotation(len(changed))
            changed = turn.T @ changed.float() if kind == "weight" else changed.float() @ turn
        return changed

    def _origin(self, name: str) -> str:
        """The stored tensor that a tensor is made of."""
        return name if name != self._head or super().__contains__(name) else f"{self._stream.embedding}.weight"

    def _read_behind(self, weight: Tensor, norm: str) -> Tensor:
        """A weight [N, H] that reads the rotated stream behind a norm whose weight is 1."""
        scale = super().get(f"{norm}.weight").float() + self._stream.norm_offset
        return (weight.float() * scale) @ rotation(weight.shape[1])

    def _rotated_values(self, tensor: Tensor, first: int) -> Tensor:
        """Values' rows, or biases, from first on, rotated within each head."""
        kept, values = tensor[:first].float(), tensor[first:].float()
        heads = values.reshape(-1, self._stream.head_size, *values.shape[1:])
        turned = torch.einsum("gd...,de->ge...", heads, rotation(self._stream.head_size))
        return torch.cat((kept, turned.reshape(values.shape)))
