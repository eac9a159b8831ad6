"""Several Linears as one product: q, k and v; gate and up, with the gating."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels import CODE_MAX, Quantized, ToInt8, int8_gated_linear, silu_mul
from quant.errors import UnlikeLinears
from quant.linear import FloatLinear, InputCodes, Int8Linear

LOWEST_CODE = -128
"""Lowest code of an activation under a static scale."""


class GatedLinear:
    """y = act(gate(x)) * up(x), in the form that the next Linear reads.

    On a GPU int8 parts become one product with the gate in its epilogue, for which their rows are stored in pairs.
    Float parts, group scales, outliers, other functions than SiLU, and a CPU, which reads halves faster than pairs,
    take one product and then `product`.

    Args:
        gate, up: Linears of one kind and shape.
        output_format: None for y in their dtype, or the `ToInt8` that the next Linear asks for.
        product: `silu_mul` or `gelu_mul`.

    Raises:
        ValueError: the parts differ in N or K.
        UnlikeLinears: the parts cannot be fused (`fuse`).

    Source: GLU variants (arXiv 2002.05202), SwiGLU.
    """

    def __init__(
        self,
        gate: FloatLinear | Int8Linear,
        up: FloatLinear | Int8Linear,
        output_format: ToInt8 | None,
        *,
        product: Callable[[Tensor, ToInt8 | None], Tensor | Quantized] = silu_mul,
    ) -> None:
        if gate.shape != up.shape:
            raise ValueError(f"gate {gate.shape} and up {up.shape} must have one shape")
        self.linear = fuse([gate, up])
        self.output_format = output_format
        self.product = product
        self.is_paired = product is silu_mul and _runs_in_pairs(self.linear)
        if self.is_paired:
            self.linear = _in_pairs(self.linear)

    def __call__(self, x: Tensor | Quantized) -> Tensor | Quantized:
        linear = self.linear
        if not self.is_paired:
            return self.product(linear(x), self.output_format)
        assert isinstance(linear, Int8Linear)
        return int8_gated_linear(
            linear.quantized(x),
            linear.weight_q,
            linear.weight_scale,
            linear.added_bias,
            linear.out_dtype,
            self.output_format,
        )

    @property
    def input_format(self) -> ToInt8 | None:
        return self.linear.input_format


def _in_pairs(linear: FloatLinear | Int8Linear) -> FloatLinear | Int8Linear:
    """The same Linear with gate and up in pairs of rows instead of halves."""
    return linear.take_rows(torch.arange(linear.shape[0]).view(2, -1).t().flatten())


def _runs_in_pairs(linear: FloatLinear | Int8Linear) -> bool:
    return isinstance(linear, Int8Linear) and linear.has_gated_kernel and linear.weight_q.is_cuda


def take_rows(linear: FloatLinear | Int8Linear, rows: Tensor) -> FloatLinear | Int8Linear:
    """The Linear of some of another's outputs, rows [n] int64, in that order: a part of what a checkpoint fuses."""
    return fuse([linear]).take_rows(rows)


def fuse(linears: Sequence[FloatLinear | Int8Linear]) -> FloatLinear | Int8Linear:
    """One Linear whose output is the concatenation of the parts' outputs, such as q, k and v, or gate and up.

    Channel and group scales are concatenated, tensor scales first expanded to one per channel; biases are concatenated,
    with zeros for a part that has none. A static input scale is the largest of the parts, so that no part saturates.
    With zero points, scale and zero point are those of the union of the parts' ranges: the parts read one input, and
    the weights do not depend on how it is rounded.

    Args:
        linears: at least one; all float or all int8 with one activation kind, one K, one dtype, one threshold of
            outliers, and the same groups.

    Raises:
        ValueError: the list is empty or its parts differ in K.
        UnlikeLinears: its parts differ in kind, activation, dtype, outliers or groups.
    """
    if not linears:
        raise ValueError("nothing to fuse: the list of Linears is empty")
    depths = sorted({linear.shape[1] for linear in linears})
    if len(depths) > 1:
        raise ValueError(f"cannot fuse Linears that read different widths: K = {depths}")
    floats = [linear for linear in linears if isinstance(linear, FloatLinear)]
    int8s = [linear for linear in linears if isinstance(linear, Int8Linear)]
    if floats and int8s:
        raise UnlikeLinears(
            f"cannot fuse {len(floats)} float with {len(int8s)} int8 Linears: they read different inputs; "
            "quantize all parts or none"
        )
    return _fuse_float(floats) if floats else _fuse_int8(int8s)


def _fuse_float(parts: list[FloatLinear]) -> FloatLinear:
    _require_same("dtype", [part.weight.dtype for part in parts])
    bias = _concat_biases([part.bias for part in parts], [part.shape[0] for part in parts])
    return FloatLinear(torch.cat([part.weight for part in parts]), bias)


def _fuse_int8(parts: list[Int8Linear]) -> Int8Linear:
    _require_same("activation", [part.input_codes.kind for part in parts])
    _require_same("out_dtype", [part.out_dtype for part in parts])
    _require_same("outliers", [part.input_codes.outliers for part in parts])
    _require_same(
        "number of groups", [part.weight_scale.shape[1] if part.weight_scale.ndim == 2 else 1 for part in parts]
    )
    sizes = [part.shape[0] for part in parts]
    scales = [
        part.weight_scale.expand(size, *part.weight_scale.shape[1:]) for part, size in zip(parts, sizes, strict=True)
    ]
    return Int8Linear(
        torch.cat([part.weight_q for part in parts]),
        torch.cat(scales),
        input_codes=_common_codes([part.input_codes for part in parts]),
        out_dtype=parts[0].out_dtype,
        bias=_concat_biases([part.bias for part in parts], sizes),
    )


def _common_codes(parts: list[InputCodes]) -> InputCodes:
    """The codes of an input that parts of one kind share; a static range includes the range of every part."""
    scale, zero_point = _common_range(parts)
    return replace(parts[0], scale=scale, zero_point=zero_point)


def _common_range(parts: list[InputCodes]) -> tuple[Tensor | None, Tensor | None]:
    """The static scale and zero point whose range, from lowest to highest code, includes that of every part."""
    scales = [part.scale for part in parts if part.scale is not None]
    if not scales:
        return None, None
    scale = torch.stack(scales)
    if all(part.zero_point is None for part in parts):
        return scale.amax(0), None
    points = [scale.new_zeros(1) if part.zero_point is None else part.zero_point for part in parts]
    zero_point = torch.stack([point.float() for point in points])
    if (scale == scale[0]).all() and (zero_point == zero_point[0]).all():
        return scales[0], zero_point[0].to(torch.int8)
    low, high = (scale * (LOWEST_CODE - zero_point)).amin(0), (scale * (CODE_MAX - zero_point)).amax(0)
    step = (high - low) / (CODE_MAX - LOWEST_CODE)
    return step, (LOWEST_CODE - low / step).round().clamp(LOWEST_CODE, CODE_MAX).to(torch.int8)


def _concat_biases(biases: list[Tensor | None], sizes: list[int]) -> Tensor | None:
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    filled = [like.new_zeros(size) if bias is None else bias for bias, size in zip(biases, sizes, strict=True)]
    return torch.cat(filled)


def _require_same(what: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        found = ", ".join(str(value) for value in values)
        raise UnlikeLinears(f"cannot fuse Linears of different {what}: {found}")
