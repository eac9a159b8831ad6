"""The ops of the W8A8 dataflow. CUDA tensors run fused Triton kernels, CPU tensors the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from kernels import reference
from kernels.cpu import ops as on_cpu
from kernels.quantized import CODE_MAX, Quantized, ToInt8
from kernels.rows import Rows

if TYPE_CHECKING or find_spec("triton") is not None:
    from kernels import activation, attention, collectives, gemm, groups, norm, outliers, quantize, rope
else:
    # A machine without a GPU needs no Triton, which takes 0.7 GB. `pick_device` refuses CUDA without it.
    activation = attention = collectives = gemm = groups = norm = outliers = quantize = rope = reference

__all__ = [
    "CODE_MAX",
    "Quantized",
    "Rows",
    "ToInt8",
    "collectives",
    "gelu",
    "gelu_mul",
    "int8_gated_linear",
    "int8_group_linear",
    "int8_linear",
    "int8_outlier_linear",
    "layer_norm",
    "paged_attention",
    "quantize_rows",
    "quantize_tensor",
    "relu",
    "rms_norm",
    "rope_and_cache",
    "rotary_attention",
    "silu_mul",
]

P = ParamSpec("P")
R = TypeVar("R")


def _by_device(on_gpu: Callable[P, R], on_cpu: Callable[P, R]) -> Callable[P, R]:
    """Returns an op that calls on_gpu or on_cpu, by the device of its first argument."""

    @wraps(on_cpu)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        tensor = first.codes if isinstance(first, Quantized) else first
        return (on_gpu if tensor.is_cuda else on_cpu)(*args, **kwargs)  # type: ignore[attr-defined]

    return op


quantize_rows = _by_device(quantize.quantize_rows, on_cpu.quantize_rows)
quantize_tensor = _by_device(quantize.quantize_tensor, on_cpu.quantize_tensor)
rms_norm = _by_device(norm.rms_norm, on_cpu.rms_norm)
layer_norm = _by_device(norm.layer_norm, reference.layer_norm)
silu_mul = _by_device(activation.silu_mul, on_cpu.silu_mul)
gelu_mul = _by_device(activation.gelu_mul, reference.gelu_mul)
gelu = _by_device(activation.gelu, reference.gelu)
relu = _by_device(activation.relu, reference.relu)
int8_linear = _by_device(gemm.int8_linear, on_cpu.int8_linear)
int8_gated_linear = _by_device(gemm.int8_gated_linear, on_cpu.int8_gated_linear)
int8_group_linear = _by_device(groups.int8_group_linear, reference.int8_group_linear)
int8_outlier_linear = _by_device(outliers.int8_outlier_linear, reference.int8_outlier_linear)
rope_and_cache = _by_device(rope.rope_and_cache, on_cpu.rope_and_cache)
paged_attention = _by_device(attention.paged_attention, on_cpu.paged_attention)
rotary_attention = _by_device(attention.rotary_attention, on_cpu.rotary_attention)
