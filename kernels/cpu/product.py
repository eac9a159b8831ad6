"""The int8 product on a CPU, exact, by the way that is fastest on the processor for so many rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cpu.library import WHY_NOT, native

EXACT_DEPTH = 1024
"""Products of codes summed over so many columns stay below 2**24, up to which float32 holds every integer."""

HAS_INT8_DOT = torch.cpu._is_vnni_supported()
"""Whether `torch._int_mm` has instructions for int8 here. Without them it is a plain loop, 3 to 30 times slower."""

HAS_VNNI = WHY_NOT is None and native.has_vnni()

HAS_AMX = WHY_NOT is None and native.has_amx()

FEW_ROWS = 32
"""Most rows that VNNI in C takes. All products of the demo model take 3.7, 3.5, 5.4, 8.8 ms at 1, 4, 16, 32 rows, and
in torch 3.3, 6.9, 9.3, 10.9; at 128 33.0 and 20.4. One row gains by its epilogue in the same call. Measured without
AMX, which torch uses too."""


def int8_product(x_q: Tensor, weight_q: Tensor, out: Tensor | None = None) -> Tensor:
    """x_q [T, K] @ weight_q [N, K]^T, both int8 with contiguous rows, in exact int32 [T, N]; K at most 131,071.

    out: int32 [T, N], contiguous, to write to; new if None.
    """
    if out is None:
        out = torch.empty(x_q.shape[0], weight_q.shape[0], dtype=torch.int32)
    has_rows = x_q.stride(1) == 1 and weight_q.stride(1) == 1
    if HAS_AMX and has_rows:
        by_amx(x_q, weight_q, out)
    elif HAS_VNNI and has_rows and len(x_q) <= FEW_ROWS:
        by_vnni(x_q, weight_q, out)
    elif HAS_INT8_DOT:
        by_int_mm(x_q, weight_q, out)
    elif WHY_NOT is None and has_rows:
        in_c(x_q, weight_q, out)
    else:
        by_float_sums(x_q, weight_q, out)
    return out


def linear_in_one(x_q: Tensor, weight_q: Tensor) -> Callable[..., None] | None:
    """The C for a product and its epilogue in one call, or None if there is none for such operands."""
    if WHY_NOT is not None or x_q.stride(1) != 1 or weight_q.stride(1) != 1:
        return None
    if HAS_AMX:
        return native.int8_linear_amx
    if HAS_VNNI and len(x_q) <= FEW_ROWS:
        return native.int8_linear_vnni
    return None if HAS_INT8_DOT else native.int8_linear


def by_int_mm(x_q: Tensor, weight_q: Tensor, out: Tensor) -> None:
    torch._int_mm(x_q.contiguous(), weight_q.t(), out=out)


def in_c(x_q: Tensor, weight_q: Tensor, out: Tensor) -> None:
    native.int8_product(*_numbers(x_q, weight_q, out))


def by_vnni(x_q: Tensor, weight_q: Tensor, out: Tensor) -> None:
    native.int8_product_vnni(*_numbers(x_q, weight_q, out))


def by_amx(x_q: Tensor, weight_q: Tensor, out: Tensor) -> None:
    native.int8_product_amx(*_numbers(x_q, weight_q, out))


def _numbers(x_q: Tensor, weight_q: Tensor, out: Tensor) -> tuple[int, ...]:
    """The arguments of the functions of product.h."""
    num_rows, num_columns = out.shape
    return (
        x_q.data_ptr(),
        weight_q.data_ptr(),
        out.data_ptr(),
        num_rows,
        num_columns,
        x_q.shape[1],
        x_q.stride(0),
        weight_q.stride(0),
    )


def by_float_sums(x_q: Tensor, weight_q: Tensor, out: Tensor) -> None:
    """In float32, over so few columns at a time that no sum is rounded."""
    out.zero_()
    for start in range(0, x_q.shape[1], EXACT_DEPTH):
        columns = slice(start, start + EXACT_DEPTH)
        out.add_((x_q[:, columns].float() @ weight_q[:, columns].float().t()).to(torch.int32))
