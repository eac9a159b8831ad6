"""The door through which every kernel is launched: what Triton finds out at each launch is found out once.

Triton binds and specializes all arguments, hashes the compile-time ones and compares the globals that a kernel reads,
every time. A `Plan` asks Triton for the compiled kernel once for each kind of arguments and remembers the answer. Ops
keep plans in caches whose keys hold all that tiles and options depend on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction, driver

__all__ = ["MAX_PLANS", "Descriptor", "Grid", "Piece", "Plan", "cdiv", "kinds_of", "power_of_2"]

MAX_PLANS = 4096
"""Plans that an op keeps: one for each tile, layout and form that it has met."""

ALIGNMENT = 16
"""Triton compiles another kernel for pointers and integers that are multiples of this."""

LONG = 2**31

Grid = tuple[int, int, int]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own cdiv and next_power_of_2 take 2 us each on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, which is 1 or more."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What the copy engine moves at once: its shape, dtype and layout in shared memory. Compared by identity."""

    block_shape: tuple[int, int]
    dtype: torch.dtype
    layout: Any


class Descriptor:
    """A matrix that a kernel moves with the copy engine, in pieces of its dtype; without a size of 0.

    It has what Triton's launcher reads of a `TensorDescriptor`. Making one of those takes four times as long, for its
    assertions, which are left to the first launch of a kind.
    """

    __slots__ = ("base", "kind", "piece", "shape", "strides")

    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, piece: Piece) -> None:
        self.base = base
        self.piece = piece
        self.shape = base.shape
        self.strides = row, column = base.stride()
        # All that the assertions and Triton's choice of a kernel depend on.
        self.kind = piece, base.data_ptr() % ALIGNMENT, row % ALIGNMENT, column

    def checked(self) -> TensorDescriptor:
        """Triton's own descriptor.

        Raises:
            AssertionError: the copy engine cannot move this tensor in such pieces.
        """
        return TensorDescriptor(self.base, self.shape, self.strides, list(self.piece.block_shape), self.piece.layout)


class Plan:
    """A kernel with its compile-time arguments and options, which launches what Triton has compiled for it.

    Triton itself launches the first of each kind of arguments on a device, everything in its interpreter, and all
    while it has hooks, as a profiler sets them, or compiles in other ways than usual.
    """

    __slots__ = ("_by_kind", "_is_interpreted", "_values", "constants", "kernel")

    def __init__(self, kernel: Any, **constants: Any) -> None:
        """constants: the values of the kernel's constexpr parameters, which are its last, and launch options."""
        values = {name: constants[name] for name in kernel.arg_names if name in constants}
        assert list(values) == kernel.arg_names[len(kernel.arg_names) - len(values) :]
        self.kernel = kernel
        self.constants = constants
        self._values = tuple(values.values())
        self._is_interpreted = not isinstance(kernel, JITFunction)
        self._by_kind: dict[Hashable, CompiledKernel] = {}

    def launch(self, grid: Grid, *args: Any) -> None:
        """Launch on the current device and stream. args: the kernel's other arguments, by position."""
        if self._is_interpreted or _is_watched() or self.kernel.pre_run_hooks:
            self._launch_by_triton(grid, args)
            return
        active = driver.active
        device = active.get_current_device()
        kind = device, kinds_of(args)
        compiled = self._by_kind.get(kind)
        if compiled is None:
            compiled = self._launch_by_triton(grid, args)
            # Something else comes back while Triton compiles in the background.
            if isinstance(compiled, CompiledKernel):
                self._by_kind[kind] = compiled
            return
        stream = active.get_current_stream(device)
        # In place of the three None Triton passes what its hooks are called with, and the hooks.
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *self._values)

    def _launch_by_triton(self, grid: Grid, args: tuple[Any, ...]) -> Any:
        checked = [arg.checked() if type(arg) is Descriptor else arg for arg in args]
        return self.kernel[grid](*checked, **self.constants)


def kinds_of(args: Iterable[Any]) -> Hashable:
    """A key of arguments of a kernel: for any of one key Triton compiles the same. It may do so for two keys, too.

    Raises:
        TypeError: no kernel takes such an argument.
    """
    kinds: list[Any] = []
    for arg in args:
        cls = type(arg)
        if isinstance(arg, Tensor):
            kinds.append(arg.dtype if arg.data_ptr() % ALIGNMENT == 0 else (arg.dtype, "unaligned"))
        elif cls is int:
            # 1 becomes a constant; integers of more than 32 bits, or negative ones, are told apart by their high bits.
            is_multiple = arg % ALIGNMENT == 0
            kinds.append("1" if arg == 1 else is_multiple if 0 <= arg < LONG else (is_multiple, arg >> 31))
        elif arg is None or cls is float:
            kinds.append(cls)
        elif cls is Descriptor:
            kinds.append(arg.kind)
        elif isinstance(arg, tuple):
            kinds.append((cls, kinds_of(arg)))
        elif isinstance(arg, int | float):
            kinds.append((cls, arg))
        else:
            raise TypeError(f"a kernel takes tensors, descriptors, numbers, None and tuples of them, not {cls}")
    return tuple(kinds)


def _is_watched() -> bool:
    """Whether Triton has hooks or compiles in another way than usual."""
    runtime = knobs.runtime
    return bool(
        getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or knobs.compilation.instrumentation_mode
    )
