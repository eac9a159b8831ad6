"""What the kernels in Gluon share: tensor descriptors for Hopper's copy engine, and the epilogue."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.epilogue import Epilogue, dequantize, gate_pairs
from kernels.launching import MAX_PLANS, Piece

__all__ = ["can_copy", "finish", "first_token", "piece_of"]

GL_TYPES = {torch.int8: gl.int8, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def can_copy(x_q: Tensor, weight_q: Tensor, ops: Epilogue, y: Tensor) -> bool:
    """Whether these kernels support this epilogue, and every row has the copy engine's alignment of 16 bytes."""
    has_scales = ops.weight_scale is not None and ops.residual is None
    places = x_q.shape[1] | 2 * y.shape[1] | x_q.data_ptr() | weight_q.data_ptr()
    return has_scales and y.dtype in GL_TYPES and places % 16 == 0


@lru_cache(maxsize=MAX_PLANS)
def piece_of(rows: int, columns: int, dtype: torch.dtype) -> Piece:
    """What the copy engine moves at once of a tensor of this dtype; one object for equal arguments."""
    return Piece((rows, columns), dtype, gl.NVMMASharedLayout.get_default_for([rows, columns], GL_TYPES[dtype]))


@gluon.jit
def first_token(tile_t, T, BLOCK_T: gl.constexpr):
    """Where a tile starts. The last one ends with the last token and overlaps the tile before it.

    So the copy engine fills no rows with zeros: with such rows 65 tokens took 16.8 us and 128 tokens 13.7.
    """
    return gl.maximum(gl.minimum(tile_t * BLOCK_T, T - BLOCK_T), 0)


@gluon.jit
def finish(acc, ops, first_t, first_n, T, N, FORM: gl.constexpr):
    """The epilogue on an accumulator in registers: y as float32, before it is rounded."""
    layout: gl.constexpr = acc.type.layout
    tokens = first_t + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    columns = first_n + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    y = dequantize(acc, ops, tokens, columns, T, N, FORM[0], FORM[1])
    return gate_pairs(y) if FORM[2] else y
