"""Loads the C extension, if it was compiled and this processor can run it."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

__all__ = ["DTYPES", "WHY_NOT", "native"]

_IS_COMPILED = find_spec("kernels.cpu.native") is not None

if TYPE_CHECKING or _IS_COMPILED:
    from kernels.cpu import native
else:
    native = None

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The float types that the extension reads and writes, by the number that it knows them by."""


def _why_not() -> str | None:
    """Why the extension is not used, or None if it is. Gives it torch's threads."""
    if not _IS_COMPILED:
        return "it was not compiled, which takes a C compiler at installation"
    if not native.is_supported():
        return "this processor has no AVX2"
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    native.use_threads(ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p).value or 0)
    return None


WHY_NOT = _why_not()
"""Why CPU tensors are computed by torch alone; None if the extension is used."""
