"""The Linear classes of the decoder: float, int8 with its scales, gated. Plain objects that serve and never train."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Literal

import torch
from torch import Tensor, nn

from kernels import Quantized, ToInt8, int8_gated_linear, int8_linear, quantize_rows, quantize_tensor, silu_mul

Activation = Literal["static", "tensor", "token"]


class FloatLinear:
    """y = x @ weight^T + bias (+ residual), in weight's dtype.

    Args:
        weight: [N, K] float.
        bias: [N] of weight's dtype, or None.
    """

    input_format: ToInt8 | None = None
    """What the op before should write: a float tensor."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        _check_shapes(weight, bias)
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor | Quantized, residual: Tensor | None = None) -> Tensor:
        """Apply to x [T, K] float; residual [T, N] or None.

        Raises:
            TypeError: x is `Quantized`: a float Linear asked for a float tensor.
        """
        if isinstance(x, Quantized):
            raise TypeError("a FloatLinear takes a float tensor, got Quantized; obey its input_format")
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if residual is None else y + residual

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def weight_bytes(self) -> int:
        return _num_bytes(self.weight, self.bias)

    def to(self, device: torch.device | str) -> FloatLinear:
        """The same Linear on another device."""
        return FloatLinear(self.weight.to(device), _move(self.bias, device))


class Int8Linear:
    """y_tn = acc_tn * x_scale_t * weight_scale_n + bias_n (+ residual_tn), acc = x_q @ weight_q^T in int32.

    Args:
        weight_q: [N, K] int8. Codes of -128, which other tools write, are multiplied like any other.
        weight_scale: float32 [N] (per output channel) or [1] (per tensor).
        bias: [N] float or None.
        activation: "token" (one scale per row), "tensor" (one per call) or "static" (input_scale for ever).
        input_scale: float32 [1], positive, for "static"; None otherwise.
        out_dtype: float16, bfloat16 or float32; of y.

    Raises:
        ValueError: a shape or dtype differs from the above, or input_scale is missing or has no use.

    Source: SmoothQuant (arXiv 2211.10438), equation 2.
    """

    def __init__(
        self,
        weight_q: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: Activation,
        input_scale: Tensor | None,
        out_dtype: torch.dtype,
    ) -> None:
        _check_shapes(weight_q, bias)
        if weight_q.dtype != torch.int8:
            raise ValueError(f"weight_q must be int8, got {weight_q.dtype}")
        if weight_scale.dtype != torch.float32 or weight_scale.shape not in ((weight_q.shape[0],), (1,)):
            raise ValueError(
                f"weight_scale must be float32 [{weight_q.shape[0]}] or [1], "
                f"got {weight_scale.dtype} {list(weight_scale.shape)}"
            )
        if (activation == "static") != (input_scale is not None):
            raise ValueError(f"activation {activation!r} with input_scale {input_scale}: static alone takes one")
        if input_scale is not None and (input_scale.dtype != torch.float32 or input_scale.shape != (1,)):
            raise ValueError(f"input_scale must be float32 [1], got {input_scale.dtype} {list(input_scale.shape)}")
        self.weight_q = weight_q
        self.weight_scale = weight_scale
        self.bias = bias
        self.activation: Activation = activation
        self.input_scale = input_scale
        self.out_dtype = out_dtype
        # Dynamic per tensor needs every row before the first code: no op before can write it, so it is done here.
        self.input_format: ToInt8 | None = None if activation == "tensor" else ToInt8(input_scale)

    def __call__(self, x: Tensor | Quantized, residual: Tensor | None = None) -> Tensor:
        """Apply to x [T, K], float or `Quantized` by input_format; residual [T, N] float or None."""
        y = int8_linear(self.quantized(x), self.weight_q, self.weight_scale, self.bias, residual, self.out_dtype)
        assert isinstance(y, Tensor)  # no out_scale was given
        return y

    def quantized(self, x: Tensor | Quantized) -> Quantized:
        """x as this Linear eats it."""
        if isinstance(x, Quantized):
            return x
        return quantize_rows(x) if self.activation == "token" else quantize_tensor(x, self.input_scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight_q.shape[0], self.weight_q.shape[1]

    @property
    def weight_bytes(self) -> int:
        return _num_bytes(self.weight_q, self.weight_scale, self.bias, self.input_scale)

    def to(self, device: torch.device | str) -> Int8Linear:
        """The same Linear on another device."""
        return Int8Linear(
            self.weight_q.to(device),
            self.weight_scale.to(device),
            _move(self.bias, device),
            self.activation,
            _move(self.input_scale, device),
            self.out_dtype,
        )


class GatedLinear:
    """y = silu(gate(x)) * up(x), in the form that the Linear after it eats.

    On a GPU int8 parts become one product with the gate in its epilogue, and their rows lie in pairs for it. Float
    parts, and a CPU, which reads halves faster than pairs, take one product and `silu_mul`.

    Args:
        gate, up: Linears of one kind and shape.
        output_format: None for y in their dtype, or the `ToInt8` that the next Linear asks for.

    Raises:
        ValueError: the parts cannot be fused (`fuse`), or differ in N.

    Source: GLU variants (arXiv 2002.05202), SwiGLU.
    """

    def __init__(
        self, gate: FloatLinear | Int8Linear, up: FloatLinear | Int8Linear, output_format: ToInt8 | None
    ) -> None:
        if gate.shape != up.shape:
            raise ValueError(f"gate {gate.shape} and up {up.shape} must have one shape")
        self.linear = fuse([gate, up])
        self.output_format = output_format
        self.is_paired = isinstance(self.linear, Int8Linear) and self.linear.weight_q.is_cuda
        if self.is_paired:
            self.linear = _reorder(self.linear, (2, -1))

    def __call__(self, x: Tensor | Quantized) -> Tensor | Quantized:
        linear = self.linear
        if not self.is_paired:
            return silu_mul(linear(x), self.output_format)
        assert isinstance(linear, Int8Linear)
        return int8_gated_linear(
            linear.quantized(x), linear.weight_q, linear.weight_scale, linear.bias, linear.out_dtype, self.output_format
        )

    @property
    def input_format(self) -> ToInt8 | None:
        return self.linear.input_format

    def to(self, device: torch.device | str) -> GatedLinear:
        """The same Linear on another device."""
        moved = copy(self)
        halves = _reorder(self.linear, (-1, 2)) if self.is_paired else self.linear
        moved.linear = halves.to(device)
        moved.is_paired = isinstance(halves, Int8Linear) and torch.device(device).type == "cuda"
        if moved.is_paired:
            moved.linear = _reorder(moved.linear, (2, -1))
        if self.output_format is not None:
            moved.output_format = ToInt8(_move(self.output_format.scale, device))
        return moved


def _reorder(linear: FloatLinear | Int8Linear, shape: tuple[int, int]) -> Int8Linear:
    """The same Linear with its rows, viewed in this shape, taken column by column: two halves become pairs, or back."""
    assert isinstance(linear, Int8Linear)
    rows = torch.arange(linear.shape[0], device=linear.weight_q.device).view(shape).t().flatten()
    return Int8Linear(
        linear.weight_q[rows],
        linear.weight_scale[rows],
        None if linear.bias is None else linear.bias[rows],
        linear.activation,
        linear.input_scale,
        linear.out_dtype,
    )


def fuse(linears: Sequence[FloatLinear | Int8Linear]) -> FloatLinear | Int8Linear:
    """One Linear whose output is the parts' outputs side by side: qkv, gate and up.

    Channel scales are concatenated, tensor scales first expanded to one per channel; biases are concatenated, zeros
    where a part has none; a static input scale is the largest of the parts, so that no part saturates.

    Args:
        linears: at least one; all float or all int8 with one activation kind, one K, one dtype.

    Raises:
        ValueError: the list is empty or its parts differ in kind, K, activation or dtype.
    """
    if not linears:
        raise ValueError("nothing to fuse: the list of Linears is empty")
    depths = sorted({linear.shape[1] for linear in linears})
    if len(depths) > 1:
        raise ValueError(f"cannot fuse Linears that read different widths: K = {depths}")
    floats = [linear for linear in linears if isinstance(linear, FloatLinear)]
    int8s = [linear for linear in linears if isinstance(linear, Int8Linear)]
    if floats and int8s:
        raise ValueError(
            f"cannot fuse {len(floats)} float with {len(int8s)} int8 Linears: they read different inputs; "
            "quantize all parts or none"
        )
    return _fuse_float(floats) if floats else _fuse_int8(int8s)


def _fuse_float(parts: list[FloatLinear]) -> FloatLinear:
    _require_same("dtype", [part.weight.dtype for part in parts])
    bias = _concat_biases([part.bias for part in parts], [part.shape[0] for part in parts])
    return FloatLinear(torch.cat([part.weight for part in parts]), bias)


def _fuse_int8(parts: list[Int8Linear]) -> Int8Linear:
    _require_same("activation", [part.activation for part in parts])
    _require_same("out_dtype", [part.out_dtype for part in parts])
    sizes = [part.shape[0] for part in parts]
    input_scales = [part.input_scale for part in parts if part.input_scale is not None]
    return Int8Linear(
        torch.cat([part.weight_q for part in parts]),
        torch.cat([part.weight_scale.expand(size) for part, size in zip(parts, sizes, strict=True)]),
        _concat_biases([part.bias for part in parts], sizes),
        parts[0].activation,
        torch.stack(input_scales).amax(0) if input_scales else None,
        parts[0].out_dtype,
    )


def _concat_biases(biases: list[Tensor | None], sizes: list[int]) -> Tensor | None:
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    filled = [like.new_zeros(size) if bias is None else bias for bias, size in zip(biases, sizes, strict=True)]
    return torch.cat(filled)


def _require_same(what: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        found = ", ".join(str(value) for value in values)
        raise ValueError(f"cannot fuse Linears of different {what}: {found}")


def _check_shapes(weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _move(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
