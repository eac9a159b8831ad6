"""Every op of the dataflow in plain torch: the specification and the oracle of the tests.

Shapes: T tokens, B requests, N out, K in, H query heads, G key/value heads, D head size. All arithmetic between the
load and the store of an op is float32; only the stored result is rounded to the dtype named. The int8 product is
exact, in int32 (`kernels.cpu.product`).
"""

from __future__ import annotations

import os

from kernels.reference.attention import paged_attention, rope_and_cache, rotary_attention
from kernels.reference.collectives import all_reduce_rms_norm, reduce_scatter_rms_norm
from kernels.reference.common import quantize_rows, quantize_tensor, split_outliers
from kernels.reference.elementwise import gelu, gelu_mul, layer_norm, relu, rms_norm, silu_mul
from kernels.reference.linear import int8_gated_linear, int8_group_linear, int8_linear, int8_matmul, int8_outlier_linear

# MKL may otherwise sum in an order that depends on where its operands lie in memory, and the same row would round
# differently alone and in a batch. It reads this at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__all__ = [
    "all_reduce_rms_norm",
    "gelu",
    "gelu_mul",
    "int8_gated_linear",
    "int8_group_linear",
    "int8_linear",
    "int8_matmul",
    "int8_outlier_linear",
    "layer_norm",
    "paged_attention",
    "quantize_rows",
    "quantize_tensor",
    "reduce_scatter_rms_norm",
    "relu",
    "rms_norm",
    "rope_and_cache",
    "rotary_attention",
    "silu_mul",
    "split_outliers",
]
