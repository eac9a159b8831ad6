"""Sums over ranks joined with the norm behind them, through memory of all ranks that each of them reaches.

Every rank runs the same kernel over its summand, in the same order of calls. A rank writes to another's memory, then
raises a signal there: a number of the exchange of that row, the generation, which each rank counts for itself in
memory, so that a captured graph can be replayed. A signal is written with release and read with acquire semantics at
the scope of the system. Sums are taken in float32, in the order of the ranks, and rounded once to the summands' dtype:
all ranks get the same bits, those of a plain sum in that order followed by `rms_norm`.

A rank that has ended is waited for without end: whoever starts ranks must end all of them then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import await_inputs, launch_dependents, starts_early
from kernels.launching import cdiv
from kernels.quantize import (
    MAX_BUSY_ROW,
    is_dynamic,
    is_static,
    load_row,
    magnitude,
    row_plan,
    store_row,
    to_codes,
    to_scale,
)
from kernels.quantized import Quantized, ToInt8
from kernels.tiles import current_gpu

__all__ = ["Peers", "all_reduce_bytes", "all_reduce_rms_norm", "reduce_scatter_bytes", "reduce_scatter_rms_norm"]

ALIGNMENT = 256
"""Bytes; each part of a rank's memory starts at a multiple."""

SIGNAL_BYTES, SCALE_BYTES = 4, 4
MAX_REGISTERS = 128
"""All that 16 warps can have; left to itself, the compiler takes half and spills a few."""


class Peers(NamedTuple):
    """Memory of all ranks for one of the ops, as one rank reaches it. No two ops, and no two streams, may share it.

    rank, size: of this one, and how many there are.
    max_rows, width: the most rows of a call and their elements, on all ranks the same.
    memory: uint8 [`all_reduce_bytes` or `reduce_scatter_bytes`], this rank's, zeroed before any rank's first call.
    bases: int64 [size], on the device: addresses of all ranks' memory, this rank's among them.
    generations: int32 [max_rows], this rank's alone, zeroed.
    kept: what must live as long as the memory is reached.
    """

    rank: int
    size: int
    max_rows: int
    width: int
    memory: Tensor
    bases: Tensor
    generations: Tensor
    kept: object = None


def all_reduce_bytes(size: int, max_rows: int, width: int, itemsize: int) -> int:
    """Memory that `all_reduce_rms_norm` needs on each rank, for rows of width elements of itemsize bytes."""
    return _aligned(SIGNAL_BYTES * max_rows * size) + 2 * size * max_rows * width * itemsize


def reduce_scatter_bytes(size: int, max_rows: int, width: int, itemsize: int) -> int:
    """Memory that `reduce_scatter_rms_norm` needs on each rank, for rows of width elements of itemsize bytes."""
    return _offsets(size, max_rows, width, itemsize)[-1] + size * cdiv(max_rows, size) * width * itemsize


def all_reduce_rms_norm(
    x: Tensor,
    peers: Peers,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Add up the ranks' x, add the residual, and scale each row to unit root mean square. See reference.

    Every rank sends its rows to all others and computes all of them: one crossing of the links, for few rows.

    Raises:
        ValueError: K is above `MAX_BUSY_ROW`, or `peers` has memory for fewer rows or for others.
    """
    x, residual = _operands(x, residual, peers)
    T, K = x.shape
    h = torch.empty_like(x)
    y, scale = _output(x, quantize)
    plan, _ = row_plan(
        _all_reduce_rms_norm_kernel, K, starts_early(x.device, T), MAX_BUSY_ROW, per_warp=256,
        SIZE=peers.size, STATIC=is_static(quantize), maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    parts_at = _aligned(SIGNAL_BYTES * peers.max_rows * peers.size)
    plan.launch(
        (T, 1, 1), x, peers.bases, peers.generations, residual, weight, h, y, scale, K, peers.max_rows, eps, peers.rank,
        peers.size, parts_at,
    )  # fmt: skip
    return y if scale is None else Quantized(y, scale), h


def reduce_scatter_rms_norm(
    x: Tensor,
    peers: Peers,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    quantize: ToInt8 | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """`all_reduce_rms_norm`, each row by the rank that owns it, which sends the others what it gives. See reference.

    Rank r owns rows r * ceil(T / size) and up. Only those of the returned h are written, and only those of the residual
    read: a step that begins with this op goes on with it. The links carry 1 / size of a row for each of the others, and
    codes with their scale instead of a row of the sum.

    Returns:
        y, in memory that the next call on any rank writes to, unless quantize has a static scale, whose codes alone
        are; and h.

    Raises:
        ValueError: as `all_reduce_rms_norm`.
    """
    x, residual = _operands(x, residual, peers)
    T, K = x.shape
    plan, _ = row_plan(
        _reduce_scatter_rms_norm_kernel, K, False, MAX_BUSY_ROW, per_warp=256,
        SIZE=peers.size, STATIC=is_static(quantize), maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    offsets = _offsets(peers.size, peers.max_rows, K, x.element_size())
    h = torch.empty_like(x)
    dtype = x.dtype if quantize is None else torch.int8
    y = peers.memory[offsets[1] : offsets[1] + T * K * dtype.itemsize].view(dtype).view(T, K)
    scale = None if quantize is None else quantize.scale
    if is_dynamic(quantize):
        scale = peers.memory[offsets[0] : offsets[0] + SCALE_BYTES * T].view(torch.float32)
    # One of each multiprocessor, so that none of them waits for one that has not begun.
    programs = min(T, current_gpu(x.device).num_sms)
    plan.launch(
        (programs, 1, 1), x, peers.bases, peers.generations, residual, weight, h, y, scale, T, K, peers.max_rows, eps,
        peers.rank, peers.size, offsets,
    )  # fmt: skip
    return y if scale is None else Quantized(y, scale), h


def _operands(x: Tensor, residual: Tensor | None, peers: Peers) -> tuple[Tensor, Tensor | None]:
    """x and residual in rows without gaps."""
    if len(x) > peers.max_rows or x.shape[1] != peers.width:
        raise ValueError(
            f"{len(x)} rows of {x.shape[1]} are to be exchanged, and the ranks have memory for {peers.max_rows} of "
            f"{peers.width}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have x's shape {tuple(x.shape)}")
    return x.contiguous(), None if residual is None else residual.contiguous()


def _output(x: Tensor, quantize: ToInt8 | None) -> tuple[Tensor, Tensor | None]:
    if quantize is None:
        return torch.empty_like(x), None
    found = torch.empty(len(x), dtype=torch.float32, device=x.device) if is_dynamic(quantize) else quantize.scale
    return torch.empty_like(x, dtype=torch.int8), found


def _offsets(size: int, max_rows: int, width: int, itemsize: int) -> tuple[int, int, int]:
    """Where scales, what is gathered, and parts begin; signals are before them, one of each rank and one at the end."""
    scales = _aligned(SIGNAL_BYTES * max_rows * (size + 1))
    gathered = scales + _aligned(SCALE_BYTES * max_rows)
    return scales, gathered, gathered + _aligned(max_rows * width * itemsize)


def _aligned(num_bytes: int) -> int:
    return cdiv(num_bytes, ALIGNMENT) * ALIGNMENT


@triton.jit
def _at(bases_ptr, peer, offset, POINTER: tl.constexpr):
    """What is at an offset of a rank's memory."""
    address = tl.load(bases_ptr + peer) + offset
    # Without it, rows are moved element by element.
    return tl.multiple_of(address.to(POINTER), 16)


@triton.jit
def _signal(bases_ptr, peer, place, generation):
    """Tell a rank that what this program has written so far is there. Call it after a barrier of the program."""
    signal_ptr = tl.load(bases_ptr + peer).to(tl.pointer_type(tl.int32)) + place
    tl.atomic_xchg(signal_ptr, generation, sem="release", scope="sys")


@triton.jit
def _await(bases_ptr, rank, place, generation):
    """Wait for a rank's signal of this generation, or of a later one."""
    signal_ptr = tl.load(bases_ptr + rank).to(tl.pointer_type(tl.int32)) + place
    # A difference, so that the numbers may wrap around.
    while tl.atomic_add(signal_ptr, 0, sem="acquire", scope="sys") - generation < 0:
        pass


@triton.jit
def _sum_parts(part_ptr, stride, columns, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all ranks' rows in float32, in the order of the ranks.

    Unrolled, so that all are read at once. Other loops over ranks are not: their addresses would fill the registers.
    """
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(SIZE):
        # Not through L1, which may hold what was here before.
        part = tl.load(part_ptr + source * stride + columns, mask=mask, other=0.0, cache_modifier=".cg")
        total += part.to(tl.float32)
    return total


@triton.jit
def _norm_row(total, residual_ptr, weight_ptr, h_ptr, row, columns, mask, K, eps):
    """Write h of one row, and return its float32 y."""
    stored = total.to(h_ptr.dtype.element_ty)
    if residual_ptr is not None:
        h = stored.to(tl.float32) + load_row(residual_ptr + row * K, columns, mask)
        stored = h.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row * K + columns, stored, mask=mask)
    h = stored.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(h * h, axis=0) / K + eps)
    return h * inverse * load_row(weight_ptr, columns, mask)


@triton.jit(do_not_specialize=["rank", "size"])
def _all_reduce_rms_norm_kernel(
    x_ptr,
    bases_ptr,
    generations_ptr,
    residual_ptr,
    weight_ptr,
    h_ptr,
    y_ptr,
    scale_ptr,
    K,
    max_rows,
    eps,
    rank,
    size,
    parts_at,
    SIZE: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row.

    Parts are kept for two generations in turn, and nobody waits at the end: who sends generation g + 2 has g + 1 of all
    others, and they sent that after they had read g.
    """
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    generation = tl.load(generations_ptr + row) + 1
    turn = (generation & 1) * SIZE
    x = tl.load(x_ptr + row * K + columns, mask=mask)
    for peer in range(size):
        part_ptr = _at(bases_ptr, peer, parts_at, x_ptr.dtype)
        tl.store(part_ptr + ((turn + rank) * max_rows + row) * K + columns, x, mask=mask)
    tl.debug_barrier()
    for peer in range(size):
        _signal(bases_ptr, peer, row * SIZE + rank, generation)
    for source in range(size):
        _await(bases_ptr, rank, row * SIZE + source, generation)
    tl.debug_barrier()
    part_ptr = _at(bases_ptr, rank, parts_at, x_ptr.dtype) + (turn * max_rows + row) * K
    total = _sum_parts(part_ptr, max_rows * K, columns, mask, SIZE, BLOCK)
    y = _norm_row(total, residual_ptr, weight_ptr, h_ptr, row, columns, mask, K, eps)
    store_row(y, y_ptr, scale_ptr, row, columns, mask, K, STATIC)
    tl.store(generations_ptr + row, generation)


@triton.jit
def _gather_row(y, bases_ptr, y_ptr, scale_ptr, row, columns, mask, K, offsets, size, STATIC: tl.constexpr):
    """Write one row of float32 y to all ranks, as `store_row` would."""
    if scale_ptr is None:
        stored = y.to(y_ptr.dtype.element_ty)
    elif STATIC:
        stored = to_codes(y, tl.load(scale_ptr))
    else:
        scale = to_scale(tl.max(magnitude(y), axis=0))
        stored = to_codes(y, scale)
        for peer in range(size):
            tl.store(_at(bases_ptr, peer, offsets[0], scale_ptr.dtype) + row, scale)
    for peer in range(size):
        tl.store(_at(bases_ptr, peer, offsets[1], y_ptr.dtype) + row * K + columns, stored, mask=mask)


@triton.jit(do_not_specialize=["T", "rank", "size"])
def _reduce_scatter_rms_norm_kernel(
    x_ptr,
    bases_ptr,
    generations_ptr,
    residual_ptr,
    weight_ptr,
    h_ptr,
    y_ptr,
    scale_ptr,
    T,
    K,
    max_rows,
    eps,
    rank,
    size,
    offsets,
    SIZE: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Every num_programs-th row, on all ranks the same: all summands are sent before any is waited for.

    One generation is kept: who sends the next summand of a row has the row's result, so its owner has read the last
    one; and an owner that sends the next result has the next summand of each rank, which has used the last one by then.
    """
    launch_dependents(DEPENDENT)
    await_inputs(DEPENDENT)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    chunk, places = tl.cdiv(T, SIZE), SIZE + 1
    stride = tl.cdiv(max_rows, SIZE).to(tl.int64) * K
    num_rows = tl.cdiv(T - tl.program_id(0), tl.num_programs(0))
    # Each rank begins with rows of the next one, so that all links are used at once.
    first = (rank + 1) * num_rows // SIZE
    for index in range(num_rows):
        row = (tl.program_id(0) + (index + first) % num_rows * tl.num_programs(0)).to(tl.int64)
        owner = row // chunk
        x = tl.load(x_ptr + row * K + columns, mask=mask)
        part_ptr = _at(bases_ptr, owner, offsets[2], x_ptr.dtype)
        tl.store(part_ptr + rank * stride + (row - owner * chunk) * K + columns, x, mask=mask)
        tl.debug_barrier()
        _signal(bases_ptr, owner, row * places + rank, tl.load(generations_ptr + row) + 1)
    for start in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(start, tl.int64)
        if row // chunk == rank:
            generation = tl.load(generations_ptr + row) + 1
            for source in range(size):
                _await(bases_ptr, rank, row * places + source, generation)
            tl.debug_barrier()
            part_ptr = _at(bases_ptr, rank, offsets[2], x_ptr.dtype) + (row - rank * chunk) * K
            total = _sum_parts(part_ptr, stride, columns, mask, SIZE, BLOCK)
            y = _norm_row(total, residual_ptr, weight_ptr, h_ptr, row, columns, mask, K, eps)
            _gather_row(y, bases_ptr, y_ptr, scale_ptr, row, columns, mask, K, offsets, size, STATIC)
            tl.debug_barrier()
            for peer in range(size):
                _signal(bases_ptr, peer, row * places + SIZE, generation)
    for start in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(start, tl.int64)
        generation = tl.load(generations_ptr + row) + 1
        _await(bases_ptr, rank, row * places + SIZE, generation)
        tl.debug_barrier()
        tl.store(generations_ptr + row, generation)
