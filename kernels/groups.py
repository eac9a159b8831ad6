"""The int8 product of weights whose every row has one scale per group of neighbouring columns."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.blocks import block_tile, launch_blocks
from kernels.epilogue import Epilogue
from kernels.quantized import BLOCK, Quantized, group_size_of
from kernels.tiles import Tile, current_gpu

__all__ = ["group_tile", "int8_group_linear"]

MAX_STAGES = 8


def int8_group_linear(
    x: Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Apply an int8 Linear whose weights have a scale per group of columns; `reference.int8_group_linear`.

    y_tn = x_scale_t * sum_g weight_scale_ng * (sum_{k in g} x_q_tk * weight_q_nk) + bias_n + residual_tn

    The inner sum is an int32 product on the tensor cores, in steps of min(group size, 128) columns; each is scaled and
    added in float32 in the order of k.

    Args:
        x: codes [T, K], scale [T] or [1].
        weight_q: [N, K] int8, contiguous.
        weight_scale: float32 [N, K / group size], the group size a power of two from 32.
        bias: [N] float or None.
        residual: [T, N] float or None.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        y [T, N], the same bits for a row whatever else is in the batch.

    Raises:
        ValueError: K differs between x and weight_q, weight_q is not contiguous, or a scale, the bias or the residual
            does not have one of the shapes above.

    Source: ZeroQuant (arXiv 2206.01861), section 4.1: group-wise weights, token-wise activations.
    """
    codes = x.codes.contiguous()
    (T, K), N = codes.shape, len(weight_q)
    if weight_q.shape[1] != K or not weight_q.is_contiguous():
        raise ValueError(f"weight_q {tuple(weight_q.shape)} must be [N, {K}] and contiguous, for x of depth {K}")
    group_size = group_size_of(weight_q, weight_scale)
    if x.scale.shape not in {(1,), (T,)}:
        raise ValueError(f"x.scale {tuple(x.scale.shape)} must be {(T,)} or (1,)")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias {tuple(bias.shape)} must be {(N,)}")
    if residual is not None and residual.shape != (T, N):
        raise ValueError(f"residual {tuple(residual.shape)} must be {(T, N)}")
    y = torch.empty((T, N), dtype=out_dtype, device=codes.device)
    if T:
        ops = Epilogue(x.scale, weight_scale, bias, None if residual is None else residual.contiguous())
        tile = group_tile(current_gpu(y.device).capability, T, group_size)
        launch_blocks(codes, weight_q, ops, y, tile, per_column=False, is_gated=False)
    return y


def group_tile(capability: int, t: int, group_size: int) -> Tile:
    """The tile of a product of t tokens: that of blocks, with steps that do not leave their group.

    capability: 90 for 9.0.
    """
    tile = block_tile(capability, group_size, t)
    if capability == 100 and tile.block_t > 32:
        # With more rows, or fewer warps, it spills a few registers.
        tile = replace(tile, block_t=64, num_warps=8)
    block_k = min(group_size, BLOCK)
    # Shorter steps, more of them on their way, for as many bytes.
    num_stages = max(tile.num_stages, min(MAX_STAGES, tile.num_stages * BLOCK // block_k))
    return replace(tile, block_k=block_k, num_stages=num_stages)
