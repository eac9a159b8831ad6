"""The Linear classes of the decoder, float and int8: plain objects for inference only."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

InputKind = Literal["static", "tensor", "token"]


class FloatLinear:
    """y = x @ weight^T + bias (+ residual), in weight's dtype.

    Args:
        weight: [N, K] float.
        bias: [N] of weight's dtype, or None.
    """

    input_format: ToInt8 | None = None
    """What the op before has to write: a float tensor."""

    is_row_independent = True
    """Whether a row's result does not depend on the other rows of the step."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        _check_shapes(weight, bias)
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor | Quantized, residual: Tensor | None = None) -> Tensor:
        """Apply to x [T, K] float; residual [T, N] or None.

        Raises:
            TypeError: x is `Quantized`.
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


@dataclass(frozen=True, slots=True, eq=False)
class InputCodes:
    """How an int8 Linear rounds what it reads.

    kind: "token" (one scale per row), "tensor" (one per call) or "static" (`scale`, whatever is read).
    scale: float32 [1], positive, for "static"; None otherwise.
    zero_point: int8 [1] of an asymmetric "static" input, the code of 0, or None.
    outliers: input columns in which a step holds this magnitude or more are multiplied in float
        (`int8_outlier_linear`); above 0 and with "token" only, or None.

    Raises:
        ValueError: scale or zero_point is missing, has no use, or is of another shape or dtype; or outliers has no use.
    """

    kind: InputKind
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    outliers: float | None = None

    def __post_init__(self) -> None:
        kind, scale, zero_point = self.kind, self.scale, self.zero_point
        if (kind == "static") != (scale is not None):
            raise ValueError(f"activation {kind!r} with input_scale {scale}: static alone takes one")
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != (1,)):
            raise ValueError(f"input_scale must be float32 [1], got {scale.dtype} {list(scale.shape)}")
        if zero_point is not None and kind != "static":
            raise ValueError(f"activation {kind!r} with input_zero_point {zero_point}: static alone takes one")
        if zero_point is not None and (zero_point.dtype != torch.int8 or zero_point.shape != (1,)):
            raise ValueError(f"input_zero_point must be int8 [1], got {zero_point.dtype} {list(zero_point.shape)}")
        if self.outliers is not None and (kind != "token" or self.outliers <= 0):
            raise ValueError(
                f"outliers = {self.outliers!r} with activation {kind!r}: a threshold above 0 goes with 'token'; else "
                "leave it None"
            )

    @property
    def reads_float(self) -> bool:
        """Whether x has to be a float tensor, since the op before cannot write these codes.

        A dynamic scale per tensor needs every row before the first code, outliers need every row before the first
        scale, and only `quantize_tensor` writes codes with a zero point.
        """
        return self.kind == "tensor" or self.outliers is not None or self.zero_point is not None

    def to(self, device: torch.device | str) -> InputCodes:
        """The same on another device."""
        return replace(self, scale=_move(self.scale, device), zero_point=_move(self.zero_point, device))


class Int8Linear:
    """y_tn = x_scale_t * sum_k (x_q_tk - zero_point) * weight_q_nk * weight_scale_nk + bias_n (+ residual_tn).

    weight_scale_nk is one per matrix or row, and is applied to the sum, or one per row and group of columns, and is
    applied to the group's sum. A zero point becomes part of the bias:
    -x_scale * zero_point * sum_k weight_q_nk * weight_scale_nk.

    Args:
        weight_q: [N, K] int8. Codes of -128, which other tools write, are multiplied like others.
        weight_scale: float32 [N] (per output channel), [1] (per tensor) or [N, K / group size] (per group of columns,
            the group size a power of two from 32).
        bias: [N] float or None.
        input_codes: how x is rounded; outliers only with one weight scale per row or matrix.
        out_dtype: float16, bfloat16 or float32; of y.

    Raises:
        ValueError: a shape or dtype differs from the above, or outliers come with scales per group.

    Source: SmoothQuant (arXiv 2211.10438), equation 2; groups: ZeroQuant (arXiv 2206.01861), section 4.1; outliers:
    LLM.int8() (arXiv 2208.07339), section 3.2; zero point: Jacob et al. (arXiv 1712.05877), equation 7.
    """

    def __init__(
        self,
        weight_q: Tensor,
        weight_scale: Tensor,
        *,
        input_codes: InputCodes,
        out_dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> None:
        _check_shapes(weight_q, bias)
        _check_weight(weight_q, weight_scale)
        if input_codes.outliers is not None and weight_scale.ndim != 1:
            raise ValueError(
                f"outliers = {input_codes.outliers!r} with weight_scale {list(weight_scale.shape)}: a threshold goes "
                "with one weight scale per row or matrix; else leave it None"
            )
        self.weight_q = weight_q
        self.weight_scale = weight_scale
        self.bias = bias
        self.input_codes = input_codes
        self.out_dtype = out_dtype
        self.added_bias = self._bias_without_zero_point()
        self.input_format: ToInt8 | None = None if input_codes.reads_float else ToInt8(input_codes.scale)

    def __call__(self, x: Tensor | Quantized, residual: Tensor | None = None) -> Tensor:
        """Apply to x [T, K], float or `Quantized` by input_format; residual [T, N] float or None.

        Raises:
            TypeError: x is `Quantized` and this Linear has outliers or a zero point.
        """
        operands = self.weight_q, self.weight_scale, self.added_bias, residual, self.out_dtype
        if self.input_codes.outliers is not None:
            return int8_outlier_linear(self._float(x), *operands, self.input_codes.outliers)
        product = int8_group_linear if self.weight_scale.ndim == 2 else int8_linear
        return product(self.quantized(x), *operands)

    def quantized(self, x: Tensor | Quantized) -> Quantized:
        """x as codes and scale, for a Linear without outliers."""
        codes = self.input_codes
        if codes.zero_point is not None:
            return quantize_tensor(self._float(x), codes.scale, codes.zero_point)
        if isinstance(x, Quantized):
            return x
        return quantize_rows(x) if codes.kind == "token" else quantize_tensor(x, codes.scale)

    def _float(self, x: Tensor | Quantized) -> Tensor:
        if isinstance(x, Quantized):
            raise TypeError(
                "a Linear with outliers or a zero point takes a float tensor, got Quantized; obey its input_format"
            )
        return x

    def _bias_without_zero_point(self) -> Tensor | None:
        """The bias minus what a zero point adds to every product, float32 [N]; the bias itself without one."""
        scale, zero_point = self.input_codes.scale, self.input_codes.zero_point
        if scale is None or zero_point is None:
            return self.bias
        scales = self.weight_scale.double().reshape(-1, self.weight_scale[0].numel())
        sums = self.weight_q.view(self.shape[0], scales.shape[1], -1).sum(-1)
        added = scale.double() * zero_point * (sums * scales).sum(-1)
        return (-added if self.bias is None else self.bias - added).float()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight_q.shape[0], self.weight_q.shape[1]

    @property
    def weight_bytes(self) -> int:
        codes = self.input_codes
        held = (self.weight_q, self.weight_scale, self.bias, codes.scale, codes.zero_point)
        return _num_bytes(*held) + (_num_bytes(self.added_bias) if codes.zero_point is not None else 0)

    @property
    def is_row_independent(self) -> bool:
        """Whether a row's result does not depend on the other rows of the step: no scale and no outliers are shared."""
        return self.input_codes.kind != "tensor" and self.input_codes.outliers is None

    @property
    def has_gated_kernel(self) -> bool:
        """Whether `int8_gated_linear` can compute its product: all scales in the epilogue, no float part."""
        return self.weight_scale.ndim == 1 and self.input_codes.outliers is None

    def to(self, device: torch.device | str) -> Int8Linear:
        """The same Linear on another device."""
        return Int8Linear(
            self.weight_q.to(device),
            self.weight_scale.to(device),
            input_codes=self.input_codes.to(device),
            out_dtype=self.out_dtype,
            bias=_move(self.bias, device),
        )

    def take_rows(self, rows: Tensor) -> Int8Linear:
        """The Linear of some of its outputs, rows [n] int64, in that order; weight_scale [N] or [N, groups]."""
        rows = rows.to(self.weight_q.device)
        return Int8Linear(
            self.weight_q[rows],
            self.weight_scale[rows],
            input_codes=self.input_codes,
            out_dtype=self.out_dtype,
            bias=None if self.bias is None else self.bias[rows],
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


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _move(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
