"""The Linear classes of the decoder: float, and int8 with its scales. Plain objects that serve and never train."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kernels import (
    Quantized,
    ToInt8,
    int8_group_linear,
    int8_linear,
    int8_outlier_linear,
    quantize_rows,
    quantize_tensor,
)
from kernels.quantized import group_size_of

Activation = Literal["static", "tensor", "token"]


class FloatLinear:
    """y = x @ weight^T + bias (+ residual), in weight's dtype.

    Args:
        weight: [N, K] float.
        bias: [N] of weight's dtype, or None.
    """

    input_format: ToInt8 | None = None
    """What the op before should write: a float tensor."""

    is_row_independent = True
    """Whether a row's result is free of what else is in the step."""

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

    def take_rows(self, rows: Tensor) -> FloatLinear:
        """The Linear of some of its outputs, rows [n] int64, in that order."""
        rows = rows.to(self.weight.device)
        return FloatLinear(self.weight[rows], None if self.bias is None else self.bias[rows])


class Int8Linear:
    """y_tn = x_scale_t * sum_k (x_q_tk - zero_point) * weight_q_nk * weight_scale_nk + bias_n (+ residual_tn).

    weight_scale_nk is one per matrix or row, and leaves the sum, or one per row and group of columns, and leaves the
    group's. A zero point leaves it too, as a part of the bias that is known beforehand:
    -x_scale * zero_point * sum_k weight_q_nk * weight_scale_nk.

    Args:
        weight_q: [N, K] int8. Codes of -128, which other tools write, are multiplied like any other.
        weight_scale: float32 [N] (per output channel), [1] (per tensor) or [N, K / group size] (per group of columns,
            the group size a power of two from 32).
        bias: [N] float or None.
        activation: "token" (one scale per row), "tensor" (one per call) or "static" (input_scale for ever).
        input_scale: float32 [1], positive, for "static"; None otherwise.
        out_dtype: float16, bfloat16 or float32; of y.
        input_zero_point: int8 [1] of an asymmetric "static" activation, the code of 0, or None.
        outliers: input columns in which a step holds this magnitude or more are multiplied in float
            (`int8_outlier_linear`), or None; only with "token" and one weight scale per row or matrix.

    Raises:
        ValueError: a shape or dtype differs from the above, input_scale is missing or has no use, or input_zero_point
            or outliers has no use.

    Source: SmoothQuant (arXiv 2211.10438), equation 2; groups: ZeroQuant (arXiv 2206.01861), section 4.1; outliers:
    LLM.int8() (arXiv 2208.07339), section 3.2; zero point: Jacob et al. (arXiv 1712.05877), equation 7.
    """

    def __init__(
        self,
        weight_q: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: Activation,
        input_scale: Tensor | None,
        out_dtype: torch.dtype,
        input_zero_point: Tensor | None = None,
        outliers: float | None = None,
    ) -> None:
        _check_shapes(weight_q, bias)
        _check_weight(weight_q, weight_scale)
        _check_input(activation, input_scale, input_zero_point)
        if outliers is not None and (activation != "token" or weight_scale.ndim != 1 or outliers <= 0):
            raise ValueError(
                f"outliers = {outliers!r} with activation {activation!r} and weight_scale {list(weight_scale.shape)}: "
                "a threshold above 0 goes with 'token' and one weight scale per row or matrix; else leave it None"
            )
        self.weight_q = weight_q
        self.weight_scale = weight_scale
        self.bias = bias
        self.activation: Activation = activation
        self.input_scale = input_scale
        self.out_dtype = out_dtype
        self.input_zero_point = input_zero_point
        self.outliers = outliers
        self.added_bias = bias if input_zero_point is None else self._bias_without_zero_point(input_zero_point)
        # Dynamic per tensor needs every row before the first code, and outliers every row before the first scale: no
        # op before can write them, so it is done here. Codes with a zero point are written here alone.
        reads_float = activation == "tensor" or outliers is not None or input_zero_point is not None
        self.input_format: ToInt8 | None = None if reads_float else ToInt8(input_scale)

    def __call__(self, x: Tensor | Quantized, residual: Tensor | None = None) -> Tensor:
        """Apply to x [T, K], float or `Quantized` by input_format; residual [T, N] float or None.

        Raises:
            TypeError: x is `Quantized` and this Linear has outliers or a zero point.
        """
        operands = self.weight_q, self.weight_scale, self.added_bias, residual, self.out_dtype
        if self.outliers is not None:
            return int8_outlier_linear(self._float(x), *operands, self.outliers)
        product = int8_group_linear if self.weight_scale.ndim == 2 else int8_linear
        return product(self.quantized(x), *operands)

    def quantized(self, x: Tensor | Quantized) -> Quantized:
        """x as this Linear eats it, where it eats codes alone."""
        if self.input_zero_point is not None:
            return quantize_tensor(self._float(x), self.input_scale, self.input_zero_point)
        if isinstance(x, Quantized):
            return x
        return quantize_rows(x) if self.activation == "token" else quantize_tensor(x, self.input_scale)

    def _float(self, x: Tensor | Quantized) -> Tensor:
        if isinstance(x, Quantized):
            raise TypeError(
                "a Linear with outliers or a zero point takes a float tensor, got Quantized; obey its input_format"
            )
        return x

    def _bias_without_zero_point(self, zero_point: Tensor) -> Tensor:
        """The bias less what the zero point adds to every product: float32 [N]."""
        assert self.input_scale is not None  # a zero point comes with one
        scales = self.weight_scale.double().reshape(-1, self.weight_scale[0].numel())
        sums = self.weight_q.view(self.shape[0], scales.shape[1], -1).sum(-1)
        added = self.input_scale.double() * zero_point * (sums * scales).sum(-1)
        return (-added if self.bias is None else self.bias - added).float()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight_q.shape[0], self.weight_q.shape[1]

    @property
    def weight_bytes(self) -> int:
        held = (self.weight_q, self.weight_scale, self.bias, self.input_scale, self.input_zero_point)
        return _num_bytes(*held) + (_num_bytes(self.added_bias) if self.input_zero_point is not None else 0)

    @property
    def is_row_independent(self) -> bool:
        """Whether a row's result does not depend on its step, in which one scale or the outliers are found for all."""
        return self.activation != "tensor" and self.outliers is None

    @property
    def has_gated_kernel(self) -> bool:
        """Whether `int8_gated_linear` computes its product: all scales in the epilogue, nothing in float."""
        return self.weight_scale.ndim == 1 and self.outliers is None

    def to(self, device: torch.device | str) -> Int8Linear:
        """The same Linear on another device."""
        return Int8Linear(
            self.weight_q.to(device),
            self.weight_scale.to(device),
            _move(self.bias, device),
            self.activation,
            _move(self.input_scale, device),
            self.out_dtype,
            _move(self.input_zero_point, device),
            self.outliers,
        )

    def take_rows(self, rows: Tensor) -> Int8Linear:
        """The Linear of some of its outputs, rows [n] int64, in that order; weight_scale [N] or [N, groups]."""
        rows = rows.to(self.weight_q.device)
        return Int8Linear(
            self.weight_q[rows],
            self.weight_scale[rows],
            None if self.bias is None else self.bias[rows],
            self.activation,
            self.input_scale,
            self.out_dtype,
            self.input_zero_point,
            self.outliers,
        )


def _check_shapes(weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")


def _check_weight(weight_q: Tensor, weight_scale: Tensor) -> None:
    if weight_q.dtype != torch.int8:
        raise ValueError(f"weight_q must be int8, got {weight_q.dtype}")
    is_grouped = weight_scale.ndim == 2
    if weight_scale.dtype != torch.float32 or not (is_grouped or weight_scale.shape in {weight_q.shape[:1], (1,)}):
        raise ValueError(
            f"weight_scale must be float32 [{weight_q.shape[0]}] or [1], or [{weight_q.shape[0]}, groups], "
            f"got {weight_scale.dtype} {list(weight_scale.shape)}"
        )
    if is_grouped:
        group_size_of(weight_q, weight_scale)


def _check_input(activation: Activation, input_scale: Tensor | None, zero_point: Tensor | None) -> None:
    if (activation == "static") != (input_scale is not None):
        raise ValueError(f"activation {activation!r} with input_scale {input_scale}: static alone takes one")
    if input_scale is not None and (input_scale.dtype != torch.float32 or input_scale.shape != (1,)):
        raise ValueError(f"input_scale must be float32 [1], got {input_scale.dtype} {list(input_scale.shape)}")
    if zero_point is None:
        return
    if activation != "static":
        raise ValueError(f"activation {activation!r} with input_zero_point {zero_point}: static alone takes one")
    if zero_point.dtype != torch.int8 or zero_point.shape != (1,):
        raise ValueError(f"input_zero_point must be int8 [1], got {zero_point.dtype} {list(zero_point.shape)}")


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _move(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
