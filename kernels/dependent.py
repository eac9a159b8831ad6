"""Dependent launch: a kernel starts while the one before it still runs, and waits before its first read or write.

On Hopper and later the tail of one kernel and the start of the next overlap. Every kernel calls `await_inputs` before
it touches anything an earlier kernel may write or read, so completion stays transitive from each to all before it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import device as Device
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.tiles import current_gpu

__all__ = ["await_inputs", "launch_dependents", "launch_early"]

HOPPER = 90
MAX_TOKENS = 64
"""Tokens of a step up to which kernels start early. H100, Llama-3.1-8B: a layer takes 98.5 us instead of 106.8 at one
token, 129.7 instead of 137.1 at 32, 162 instead of 165 at 64, and 220 instead of 218 at 128, where programs that wait
take places from programs that run."""


def launch_early(device: Device, num_tokens: int) -> dict[str, Any]:
    """The launch options of a kernel that calls `await_inputs`: dependent launch where the GPU has it and it pays."""
    is_early = num_tokens <= MAX_TOKENS and current_gpu(device).capability >= HOPPER
    return {"DEPENDENT": is_early, "launch_pdl": is_early}


@triton.jit
def launch_dependents(DEPENDENT: tl.constexpr):
    """Allow the next kernel to start once all programs of this one have come here or ended.

    A small kernel says so at once. A GEMM says so before its epilogue: programs of the next kernel that arrive earlier
    take the places of its own on multiprocessors that are ahead, and the others fall behind (20 % at 512 tokens).
    """
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def await_inputs(DEPENDENT: tl.constexpr):
    """Wait until all kernels before this one have finished."""
    if DEPENDENT:
        gdc_wait()
