"""Launch every op through its plans and through Triton's own door, with nothing behind, and compare.

What Triton would compile is noted instead. The last line of the output is a JSON object of what was found.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from triton import compiler, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

import kernels
from benchmarks.launches import cases as launch_cases
from benchmarks.stand_in import HOPPER, stand_in
from kernels import gemm, launching
from kernels.norm import _rms_norm_kernel
from kernels.quantized import Quantized, ToInt8
from kernels.tiles import Tile

TILES = [
    Tile("stream", 16, 64, 128, num_warps=4, num_stages=6),
    Tile("swapped", 16, 64, 128, num_warps=4, num_stages=2),
    Tile("plain", 32, 64, 128, num_warps=4, num_stages=2),
    Tile("pingpong", 64, 64, 128, num_warps=4, num_stages=4),
]
TOKENS = (1, 16, 17, 65)
"""A number that Triton makes a constant, one that it knows to be a multiple of 16, others; 65 is not launched early."""

H, G, D = 4, 2, 64
TURNS = 400

Call = Callable[[], object]
launches: list[Any] = []
kernels_run: list[int] = []


class Driver:
    """As much of a driver as a launch asks for."""

    def __init__(self) -> None:
        self.device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", HOPPER.capability, 32)


class Compiled(CompiledKernel):  # type: ignore[misc]
    """In place of a compiled kernel: what it would have been compiled from. Its launches are noted."""

    def __init__(self, src: Any, target: GPUTarget, options: dict[str, Any]) -> None:
        self.src = src
        self.name = src.fn.__name__
        self.source = repr((self.name, src.signature, src.constants, src.attrs, sorted(options.items())))
        self.module = self.function = 1
        self.packed_metadata = (4, 1, 0)
        self._run = self.note

    def note(self, *args: Any) -> None:
        *grid, stream, function, metadata, launch_metadata, enter, leave = args[:9]
        assert (function, metadata) == (self.function, self.packed_metadata)
        launches.append((self.source, grid, stream, shown(args[9:])))
        kernels_run.append(id(self))
        if enter is not None:
            enter(launch_metadata)
            leave(launch_metadata)


def shown(value: Any) -> Any:
    """An operand by what a kernel gets of it; of an address only its alignment, as each run has its own outputs."""
    if isinstance(value, Tensor):
        return str(value.dtype), list(value.shape), value.stride(), value.data_ptr() % 16
    if hasattr(value, "base"):
        return shown(value.base), list(value.shape), list(value.strides), value.padding
    if isinstance(value, tuple):
        return [shown(part) for part in value]
    return repr(value)


def floats(rng: random.Random, *shape: int) -> Tensor:
    """A float16 tensor, now and then at an address that is no multiple of 16 bytes."""
    size, shift = 1, rng.choice((0, 0, 1))
    for length in shape:
        size *= length
    return torch.zeros(size + 8, dtype=torch.float16)[shift : shift + size].view(shape)


def codes(rng: random.Random, rows: int, columns: int) -> Quantized:
    shift = rng.choice((0, 0, 8))
    flat = torch.zeros(rows * columns + 16, dtype=torch.int8)
    return Quantized(flat[shift : shift + rows * columns].view(rows, columns), torch.zeros(rng.choice((1, rows))))


def case(rng: random.Random) -> Call:
    """One op on operands that differ in all that a kernel is compiled for."""
    T, K = rng.choice(TOKENS), rng.choice((128, 96, 100))
    to = rng.choice((None, ToInt8(), ToInt8(torch.zeros(1))))
    x = floats(rng, T, rng.choice((K, K + 1, 2 * K)))[:, :K]
    makes: list[Callable[[random.Random, Tensor, ToInt8 | None], Call]]
    makes = [_norm, _rounding, _linear, _gated, _grouped, _attention]
    return rng.choice(makes)(rng, x, to)


def _norm(rng: random.Random, x: Tensor, to: ToInt8 | None) -> Call:
    weight, residual = floats(rng, x.shape[1]), rng.choice((None, floats(rng, *x.shape)))
    return lambda: kernels.rms_norm(x, weight, 1e-5, residual, to)


def _rounding(rng: random.Random, x: Tensor, to: ToInt8 | None) -> Call:
    ops: list[Callable[[Tensor], object]] = [kernels.quantize_rows, kernels.silu_mul, kernels.quantize_tensor]
    return partial(rng.choice(ops), x)


def _product(rng: random.Random, x: Tensor, N: int) -> tuple[Quantized, Tensor, Tensor, Tensor | None]:
    K = x.shape[1]
    weight = codes(rng, N, K)
    return codes(rng, x.shape[0], K), weight.codes, weight.scale, rng.choice((None, torch.zeros(N)))


def _linear(rng: random.Random, x: Tensor, to: ToInt8 | None) -> Call:
    N, tile = rng.choice((128, 72)), rng.choice(TILES)
    operands = _product(rng, x, N)
    residual = rng.choice((None, None, floats(rng, x.shape[0], N)))
    return with_tile(tile, lambda: kernels.int8_linear(*operands, residual))


def _gated(rng: random.Random, x: Tensor, to: ToInt8 | None) -> Call:
    operands, tile = _product(rng, x, rng.choice((128, 72))), rng.choice(TILES)
    return with_tile(tile, lambda: kernels.int8_gated_linear(*operands, torch.float16, to))


def _grouped(rng: random.Random, x: Tensor, to: ToInt8 | None) -> Call:
    x_q, weight = codes(rng, x.shape[0], 128), codes(rng, 64, 128)
    return lambda: kernels.int8_group_linear(x_q, weight.codes, torch.zeros(64, 128 // 32))


def _attention(rng: random.Random, x: Tensor, to: ToInt8 | None) -> Call:
    T = x.shape[0]
    cache: Any = floats(rng, 8, 16, G, D)
    if rng.random() < 0.5:
        cache = Quantized(torch.zeros(8, 16, G, D, dtype=torch.int8), torch.zeros(8, 16, G))
    qkv, rope = floats(rng, T, (H + 2 * G) * D), torch.zeros(64, D)
    step, is_decode = torch.zeros(T + 1, dtype=torch.int32), rng.random() < 0.5
    tables, arrivals = (torch.zeros(T, n, dtype=torch.int32) for n in (rng.choice((1, 4, 16)), G))
    rows = kernels.Rows(
        step[:T], step[:T], step, step[:T], tables, is_decode, arrivals, is_decode and rng.random() < 0.7
    )
    window, norm = rng.choice((None, 32)), rng.choice((None, None, floats(rng, D)))

    def call() -> None:
        where = rows, rope, cache, cache, H, 0.125
        kernels.rotary_attention(qkv, *where, to, window, q_weight=norm, k_weight=norm)

    return call


def with_tile(tile: Tile, call: Call) -> Call:
    def chosen() -> object:
        vars(gemm)["choose"] = lambda *_: tile
        return call()

    return chosen


def recorded(call: Call) -> list[Any]:
    launches.clear()
    call()
    return list(launches)


def by_triton(call: Call) -> list[Any]:
    """The launches of a call with a hook set, so that all of them are Triton's own."""
    seen: list[Any] = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        found = recorded(call)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == len(found)
    return found


def python_calls(call: Call) -> int:
    """Calls of Python functions during a call, without those of this file."""
    count = 0

    def note(frame: FrameType, event: str, _arg: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename != __file__

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def differences() -> list[str]:
    """Launches that differ from Triton's own. Plans of one case are met by the operands of others."""
    rng, found = random.Random(0), []
    for turn in range(TURNS):
        call = case(rng)
        ours, again, wanted = recorded(call), recorded(call), by_triton(call)
        found += [f"turn {turn}: {ours} {again} {wanted}"] if not ours == again == wanted else []
    return found


def places(call: Call, driver: Driver) -> list[tuple[int, int]]:
    """(kernel, stream) of a call on device 0, on device 1 twice, and on device 0 again."""
    found = []
    for driver.device in (0, 1, 1, 0):
        _, _, stream, _ = recorded(call)[0]
        found.append((kernels_run[-1], stream))
    return found


def ways_to_triton(call: Call, kernel: Any) -> dict[str, bool]:
    """Whether Triton itself makes the launch of a call with a plan while something of it is watched or set."""
    calls: list[str] = []

    def is_tritons() -> bool:
        calls.clear()
        recorded(call)
        return len(calls) == 1

    run = kernel.run

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kernel.__name__)
        return run(*args, **kwargs)

    kernel.run = noted
    found = {"nothing": is_tritons()}
    kernel.pre_run_hooks.append(lambda *_args, **_kwargs: None)
    found["pre_run_hooks"] = is_tritons()
    kernel.pre_run_hooks.clear()
    for settings, name, value in (
        (knobs.runtime, "launch_enter_hook", knobs.HookChain()),
        (knobs.runtime, "launch_exit_hook", lambda _metadata: None),
        (knobs.runtime, "launch_exit_hook", None),
        (knobs.runtime, "add_stages_inspection_hook", lambda *_args: ("key", "hash")),
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "proton"),
    ):
        before = getattr(settings, name)
        setattr(settings, name, value)
        found[f"{name} {type(value).__name__}"] = is_tritons()
        setattr(settings, name, before)
    del kernel.run
    return found


def blind_differences() -> int:
    """Launches that differ from Triton's own if arguments are told apart by their type alone."""
    seeing, launching.kinds_of = launching.kinds_of, lambda args: tuple(map(type, args))
    try:
        return len(differences())
    finally:
        launching.kinds_of = seeing


def main() -> None:
    driver = Driver()
    stand_in(driver)
    compiler.compile = Compiled
    rng = random.Random(1)
    x = torch.zeros(17, 128, dtype=torch.float16)
    x_q, weight = Quantized(torch.zeros(17, 128, dtype=torch.int8), torch.zeros(17)), codes(rng, 128, 128)

    def norm() -> object:
        return kernels.rms_norm(x, x[0], 1e-5, x, ToInt8())

    stream, pingpong = (
        with_tile(tile, lambda: kernels.int8_linear(x_q, weight.codes, weight.scale)) for tile in (TILES[0], TILES[3])
    )
    calls = {"rms_norm": norm, "stream": stream, "pingpong": pingpong}
    result = {
        "launches": {name: len(recorded(call)) for name, call in calls.items()},
        "calls": {name: python_calls(call) for name, call in calls.items()},
        "places": places(norm, driver),
        "ways": ways_to_triton(norm, _rms_norm_kernel),
        "model": {name: len(recorded(call)) for name, call in launch_cases(16, torch.device("cpu"))},
        "differences": differences(),
        "blind": blind_differences(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
