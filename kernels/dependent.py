"""Dependent launch: a kernel starts while the one before it still runs, and waits before its first read or write.

On Hopper and later the end of one kernel and the start of the next overlap. Every kernel calls `await_inputs` before it
reads or writes anything that a kernel before it may write or read, so once a kernel has run, all before it have run.
What was written before the last kernel that is launched plainly, as torch's are, may be read earlier: weights, the
tables of a step and the keys of earlier steps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import device as Device
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.tiles import current_gpu

__all__ = ["HOPPER", "await_inputs", "launch_dependents", "starts_early"]

HOPPER = 90
MAX_TOKENS = 64
"""Most tokens of a step whose kernels start early. H100, Llama-3.1-8B: a layer takes 98.5 us instead of 106.8 at one
token, 129.7 instead of 137.1 at 32, 162 instead of 165 at 64, and 220 instead of 218 at 128, where waiting programs
take multiprocessors from running ones."""


def starts_early(device: Device, num_tokens: int) -> bool:
    """Whether a kernel that calls `await_inputs` is launched dependently: the GPU can, and it is faster.

    It is DEPENDENT then, and launched with the option launch_pdl.
    """
    return num_tokens <= MAX_TOKENS and current_gpu(device).capability >= HOPPER


@triton.jit
def launch_dependents(DEPENDENT: tl.constexpr):
    """Allow the next kernel to start once all programs of this one have called this or ended.

    A small kernel calls it first. A GEMM calls it before its epilogue: if the next kernel's programs start earlier,
    they take multiprocessors that this kernel's own programs need (20 % slower at 512 tokens).
    """
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def await_inputs(DEPENDENT: tl.constexpr):
    """Wait until all kernels before this one have finished."""
    if DEPENDENT:
        gdc_wait()
