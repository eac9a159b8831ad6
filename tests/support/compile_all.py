"""Compile every kernel as its wrapper launches it, for every architecture, on a machine with no GPU.

The wrappers run on meta tensors with the launch replaced by a note of its arguments; what is compiled is therefore what
ships: the default tile of each architecture and bucket, every tuned tile, realistic shapes and dtypes. The last line of
the output is a JSON list, one object per kernel and architecture.

As a program it takes a regular expression of the cases to compile, and `--without-doubles`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from kernels import (
    activation,
    attention,
    collectives,
    decode_attention,
    dependent,
    gemm,
    groups,
    norm,
    outliers,
    quantize,
    tiles,
)
from kernels.epilogue import Epilogue
from kernels.hopper import stream
from kernels.launching import Descriptor, Plan
from kernels.quantized import Quantized, ToInt8
from kernels.rows import Rows
from tests.support.doubles import is_double

ARCHITECTURES = (80, 89, 90, 100, 120)
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
VARYING = {"T", "N", "K", "scale", "max_blocks", "num_requests"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Launch:
    """One recorded launch: the case it stands for, the kernel, and its arguments by name."""

    capability: int
    case: str
    fn: JITFunction
    arguments: dict[str, Any]

    @property
    def is_double(self) -> bool:
        return is_double(self.capability, self.fn.__name__, self.arguments)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rows(T: int = 64) -> None:
    """Norms, activations and quantization, at the longest row allowed, whose registers are the tightest."""
    static = ToInt8(meta(1, dtype=torch.float32))
    quantize.quantize_rows(meta(T, quantize.MAX_ROW))
    x, weight = meta(T, quantize.MAX_BUSY_ROW), meta(quantize.MAX_BUSY_ROW)
    for to in (None, ToInt8(), static):
        norm.rms_norm(x, weight, 1e-5, x, to)
        norm.layer_norm(x, weight, weight, 1e-5, x, to)
        activation.silu_mul(meta(T, 2 * quantize.MAX_ROW), to)
        activation.gelu_mul(meta(T, 2 * quantize.MAX_ROW), to)
        activation.gelu(x, "none", to)
    for to in (ToInt8(), static):
        activation.gelu(x, "tanh", to)
        activation.relu(meta(T, quantize.MAX_ROW), to)
    quantize.quantize_tensor(meta(T, 4096))
    quantize.quantize_tensor(meta(T, 4096), static.scale)
    quantize.quantize_tensor(meta(T, 4096), static.scale, meta(1, dtype=torch.int8))


def exchanged() -> None:
    """Sums over two and eight ranks with the norm behind them, at the longest row allowed and at one of a model."""
    static = ToInt8(meta(1, dtype=torch.float32))
    for size, K in ((2, quantize.MAX_BUSY_ROW), (8, 8192)):
        for op, num_bytes, T in (
            (collectives.all_reduce_rms_norm, collectives.all_reduce_bytes, 64),
            (collectives.reduce_scatter_rms_norm, collectives.reduce_scatter_bytes, 512),
        ):
            memory = meta(num_bytes(size, T, K, 2), dtype=torch.uint8)
            generations, bases = meta(T, dtype=torch.int32), meta(size, dtype=torch.int64)
            peers = collectives.Peers(1, size, T, K, memory, bases, generations)
            for to in (None, ToInt8(), static):
                op(meta(T, K), peers, meta(K), 1e-5, meta(T, K), to)
            op(meta(T, K), peers, meta(K), 1e-5, None, ToInt8())


def linears() -> None:
    """Every default tile: wide and narrow N, all buckets of T; then the epilogues, on the prefill tile."""
    scale = meta(1, dtype=torch.float32)
    for N, K in ((28672, 4096), (4096, 14336)):
        weight, weight_scale = meta(N, K, dtype=torch.int8), meta(N, dtype=torch.float32)
        for T in (1, 32, 64, 128, 256, 512, 1024, 2048):
            x = Quantized(meta(T, K, dtype=torch.int8), meta(T, dtype=torch.float32))
            gemm.int8_linear(x, weight, weight_scale, residual=meta(T, N) if N == 4096 else None)
            if N == 28672:
                gemm.int8_gated_linear(x, weight, weight_scale, quantize=ToInt8())
    gemm.int8_gated_linear(x, weight, weight_scale, meta(N), torch.bfloat16, ToInt8(scale))
    gemm.int8_matmul(x.codes, weight)
    gemm.int8_linear(x, weight, weight_scale, meta(N), meta(T, N))
    gemm.int8_linear(Quantized(x.codes, scale), weight, scale, meta(N), out_dtype=torch.bfloat16)
    for N, K in ((1536, 576), (300, 200)):
        odd = Quantized(meta(17, K, dtype=torch.int8), meta(17, dtype=torch.float32))
        gemm.int8_linear(odd, meta(N, K, dtype=torch.int8), meta(N, dtype=torch.float32))


def grouped() -> None:
    """Scales per group of the weight, every depth of a step at every default tile; then the epilogues."""
    N, K, one = 4096, 14336, meta(1, dtype=torch.float32)
    for group in (32, 64, 128):
        weight, weight_scale = meta(N, K, dtype=torch.int8), meta(N, K // group, dtype=torch.float32)
        for T in (1, 32, 128, 2048):
            x = Quantized(meta(T, K, dtype=torch.int8), meta(T, dtype=torch.float32))
            groups.int8_group_linear(x, weight, weight_scale, residual=meta(T, N))
    groups.int8_group_linear(x, weight, meta(N, K // 256, dtype=torch.float32))
    groups.int8_group_linear(Quantized(x.codes, one), weight, weight_scale, meta(N), out_dtype=torch.bfloat16)


def mixed() -> None:
    """LLM.int8(), at the longest row allowed, whose registers are the tightest."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for T, K in ((1, 4096), (64, 4096), (64, quantize.MAX_ROW)):
            weight, scale = meta(4096, K, dtype=torch.int8), meta(4096, dtype=torch.float32)
            outliers.int8_outlier_linear(meta(T, K, dtype=dtype), weight, scale, out_dtype=dtype)
    outliers.int8_outlier_linear(meta(T, K), weight, meta(1, dtype=torch.float32))


def tuned(capability: int) -> None:
    """Every tile of every table shipped for an architecture."""
    tables = [json.loads(path.read_text()) for path in sorted(tiles.FOLDER.glob("*.json"))]
    shapes = [shape for table in tables if table["capability"] == capability for shape in table["tiles"].values()]
    weight, weight_scale = meta(28672, 4096, dtype=torch.int8), meta(28672, dtype=torch.float32)
    for tile in {tiles.Tile(**fields) for buckets in shapes for fields in buckets.values()}:
        x = Quantized(meta(8192, 4096, dtype=torch.int8), meta(8192, dtype=torch.float32))
        ops = Epilogue(x.scale, weight_scale)
        gemm.launch(x.codes, weight, ops, meta(8192, 28672), tile)
        row_max = meta(8192, 28672 // min(tile.block_n, 128), dtype=torch.float32)
        gemm.launch(x.codes, weight, ops._replace(row_max=row_max), meta(8192, 14336), tile, is_gated=True)


def attentions(capability: int) -> None:
    """Head sizes and dtypes, float and int8 caches, decodes of one split and of sixteen, alone and among many."""
    for D, H, G in ((64, 32, 8), (96, 32, 32), (128, 32, 8), (256, 8, 1)):
        for dtype in (torch.float16, torch.bfloat16) if D == 64 else (torch.float16,):
            for is_int8 in (False, True):
                attend(D, H, G, dtype, is_int8, is_whole=D == 128)
    attend(128, 32, 8, torch.bfloat16, is_int8=True)
    for D, H, G in ((256, 8, 4), (128, 32, 16)):
        # What takes the most registers, and the same over a float cache once.
        for is_int8 in (True,) if D == 128 else (False, True):
            attend(D, H, G, torch.bfloat16, is_int8, window=4096, soft_cap=50.0)
        attend(D, H, G, torch.bfloat16, is_int8=D == 128, window=1024, is_normed=True, has_sink=True)
    for is_int8 in (False, True):
        attend(128, 32, 8, torch.float32, is_int8)
    if capability == 90:
        # More query heads of a key head than Hopper's own kernel of decodes takes.
        for D, is_int8 in ((64, False), (64, True), (128, False), (128, True)):
            dtype = torch.bfloat16 if (D, is_int8) == (64, True) else torch.float16
            attend(D, 32, 2, dtype, is_int8, is_whole=D == 128 and is_int8)
        # Blocks of a tile, which its kernel of prompts takes from a float cache.
        for D, dtype in ((64, torch.float16), (128, torch.float16), (128, torch.bfloat16)):
            prompts(D, 32, 8, dtype)
        # Rows of a tile that no query fills, and many heads of a query.
        for H, G in ((24, 8), (64, 2)):
            prompts(128, H, G, torch.float16)


def prompts(D: int, H: int, G: int, dtype: torch.dtype) -> None:
    """Attention alone, over a float cache in blocks of 64."""
    table, starts, contexts = (meta(*size, dtype=torch.int32) for size in ((4, 256), (5,), (4,)))
    cache = meta(64, 64, G, D, dtype=dtype)
    attention.paged_attention(meta(512, H, D, dtype=dtype), cache, cache, table, starts, contexts, False, D**-0.5)


def attend(
    D: int,
    H: int,
    G: int,
    dtype: torch.dtype,
    is_int8: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    is_normed: bool = False,
    has_sink: bool = False,
    is_whole: bool = False,
) -> None:
    ints, floats = {"dtype": torch.int32}, {"dtype": torch.float32}
    cache: Any = meta(64, 16, G, D, dtype=torch.int8 if is_int8 else dtype)
    if is_int8:
        cache = Quantized(cache, meta(64, 16, G, **floats))
    norm = meta(D, dtype=dtype) if is_normed else None
    sink = meta(1, (H + 2 * G) * D, dtype=dtype) if has_sink else None
    # Requests that prompts are beside, that decode by themselves, and, for one model, many and short ones. Prompts of
    # many tokens dequantize an int8 cache, to bfloat16 as to float16, so only the widest layouts are compiled for both.
    T = 512 if dtype == torch.float16 or window is not None else 256
    steps = [(256, T, 4), (256, 4, 4)] + ([(4, T, 4), (4, 4, 4), (256, T, 128)] if is_whole else [])
    for width, T, B in steps:
        token, request, is_decode = meta(T, **ints), meta(B, **ints), T == B
        table, arrivals = meta(B, width, **ints), meta(B, G, **ints)
        rows = Rows(token, token, meta(B + 1, **ints), request, table, is_decode, arrivals, is_decode)
        where = rows, meta(4096, D, **floats), cache, cache, H, D**-0.5, ToInt8(), window, soft_cap
        attention.rotary_attention(meta(T, (H + 2 * G) * D, dtype=dtype), *where, norm, norm, 1e-5, sink)


def record() -> list[Launch]:
    """Every distinct launch of the wrappers on every architecture."""
    launches: dict[str, Launch] = {}
    capability = 0

    def note(self: Plan, grid: Any, *args: Any) -> None:
        kernel = self.kernel
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | self.constants
        shown = {name: kind(value) for name, value in arguments.items()}
        shown["depth"] = "aligned" if arguments.get("K", 0) % 16 == 0 else "odd"
        shown = {k: v for k, v in shown.items() if k not in VARYING and not k.startswith("stride")}
        case = f"sm_{capability} {kernel.__name__} " + " ".join(f"{k}={v}" for k, v in shown.items() if v is not None)
        launches.setdefault(case, Launch(capability, case, kernel, arguments))

    Plan.launch = note  # type: ignore[method-assign]
    for module in (gemm, groups, attention, decode_attention, dependent, collectives, stream):
        vars(module)["current_gpu"] = lambda _: tiles.Target("untuned", capability, num_sms=100)
    for capability in ARCHITECTURES:
        rows()
        exchanged()
        linears()
        grouped()
        mixed()
        tuned(capability)
        attentions(capability)
    return list(launches.values())


def kind(value: Any) -> Any:
    """An argument as Triton's signature tells it, or as it is."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, Descriptor):
        piece = value.piece
        return f"tensordesc<{TYPES[piece.dtype][1:]}{list(piece.block_shape)},{piece.layout!r}>"
    return tuple(map(kind, value)) if isinstance(value, tuple) else value


def source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch, specialized as its runtime would, and the options."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    arguments = dict(launch.arguments)

    def describe(value: Any, path: tuple[int, ...], is_constant: bool, specialize: bool) -> Any:
        if isinstance(value, tuple):
            parts = (describe(part, (*path, i), False, specialize) for i, part in enumerate(value))
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if is_constant or value is None or (specialize and type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (specialize and type(value) is int and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor | Descriptor):
            return kind(value)
        return "fp32" if isinstance(value, float) else "i32"

    for index, parameter in enumerate(launch.fn.params):
        value = arguments.pop(parameter.name)
        signature[parameter.name] = describe(value, (index,), parameter.is_constexpr, not parameter.do_not_specialize)
    language = GluonASTSource if launch.fn.is_gluon() else ASTSource
    return language(launch.fn, signature, constants, attributes), arguments


def build(launch: Launch) -> dict[str, Any]:
    """Compile one launch; read its instructions, shared memory and stack (a spilled register lives on the stack)."""
    result: dict[str, Any] = {"case": launch.case, "kernel": launch.fn.__name__, "capability": launch.capability}
    src, options = source(launch)
    compiled = triton.compile(src, target=GPUTarget("cuda", launch.capability, 32), options=options)
    matrix = re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)(\S*)", compiled.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, check=True, text=True).stdout
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL"))
    return result | {
        "matrix": sorted({name + suffix for name, suffix in matrix}),
        "shared": compiled.metadata.shared,
        "registers": registers,
        "stack": stack + local,
    }


LAUNCHES: list[Launch] = []


def build_nth(index: int) -> dict[str, Any]:
    return build(LAUNCHES[index])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--without-doubles", action="store_true")
    args = parser.parse_args()
    chosen = (launch for launch in record() if re.search(args.pattern, launch.case))
    LAUNCHES.extend(launch for launch in chosen if not (args.without_doubles and launch.is_double))
    with multiprocessing.get_context("fork").Pool() as pool:
        results = pool.map(build_nth, range(len(LAUNCHES)), chunksize=4)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
