from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import Quantized, ToInt8, quantize_rows, quantize_tensor
from quant.convert.rounding import ScaleRule, Strategy, quantize_weight
from quant.errors import UnlikeLinears
from quant.fused import GatedLinear, _in_pairs, fuse, take_rows
from quant.linear import FloatLinear, InputCodes, InputKind, Int8Linear
from tests.support.kernel_checks import floats_of
from tests.support.narrowed import int8_of, present

N, K, T = 24, 32, 5


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8_linear(
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: InputKind,
    input_scale: Tensor | None,
    out_dtype: torch.dtype,
    input_zero_point: Tensor | None = None,
    outliers: float | None = None,
) -> Int8Linear:
    input_codes = InputCodes(activation, input_scale, input_zero_point, outliers)
    return Int8Linear(weight_q, weight_scale, input_codes=input_codes, out_dtype=out_dtype, bias=bias)


def int8(
    weight: Tensor,
    activation: InputKind = "token",
    bias: Tensor | None = None,
    strategy: Strategy = "channel",
    input_scale: float | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Int8Linear:
    codes, scale = quantize_weight(weight, ScaleRule(strategy, torch.float32))
    static = torch.tensor([input_scale]) if input_scale is not None else None
    return int8_linear(codes, scale.reshape(-1), bias, activation, static, out_dtype)


def dequantized(linear: Int8Linear) -> torch.Tensor:
    return linear.weight_q.double() * linear.weight_scale.double()[:, None]


@pytest.mark.parametrize(
    ("activation", "input_scale"),
    [("token", None), ("tensor", None), ("static", 0.03)],
    ids=["token", "tensor", "static"],
)
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int8_is_the_product_of_the_dequantized_operands(
    activation: InputKind, input_scale: float | None, strategy: Strategy
) -> None:
    x, residual, bias = rand(T, K, seed=1), rand(T, N, seed=2), rand(N, seed=3)
    linear = int8(rand(N, K), activation, bias, strategy, input_scale)
    x_q = quantize_rows(x) if activation == "token" else quantize_tensor(x, linear.input_codes.scale)
    x_scale = x_q.scale.double()[:, None]
    expected = (x_q.codes.double() * x_scale) @ dequantized(linear).T + bias + residual
    y = linear(x, residual)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    # Codes from the op before and codes made here are the same thing.
    assert torch.equal(linear(x_q, residual), y)
    # The corrupted twin: one code off is seen.
    x_q.codes[0, 0] += 1 if x_q.codes[0, 0] < 127 else -1
    assert not torch.allclose(linear(x_q, residual).double(), expected, rtol=1e-5, atol=1e-5)


def test_input_format_says_what_the_op_before_should_write() -> None:
    weight = rand(N, K)
    assert FloatLinear(weight).input_format is None
    assert int8(weight, "tensor").input_format is None
    assert int8(weight, "token").input_format == ToInt8()
    static = int8(weight, "static", input_scale=0.5)
    assert present(static.input_format).scale is static.input_codes.scale


def test_float_linear_adds_bias_and_residual() -> None:
    weight, bias, x, residual = rand(N, K), rand(N, seed=1), rand(T, K, seed=2), rand(T, N, seed=3)
    torch.testing.assert_close(FloatLinear(weight, bias)(x, residual), x @ weight.T + bias + residual)
    with pytest.raises(TypeError, match="input_format"):
        FloatLinear(weight)(quantize_rows(x))


def test_shape_bytes_and_device() -> None:
    linear = int8(rand(N, K), "static", rand(N), input_scale=0.5)
    assert linear.shape == (N, K)
    assert linear.weight_bytes == N * K + 4 * N + 4 * N + 4
    assert FloatLinear(rand(N, K).bfloat16()).weight_bytes == 2 * N * K
    moved = linear.to("meta")
    assert moved.weight_q.is_meta
    assert present(moved.input_format).scale is moved.input_codes.scale
    assert present(FloatLinear(rand(N, K), rand(N)).to("meta").bias).is_meta


@pytest.mark.parametrize("activation", ["token", "tensor", "static"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fused_int8_is_its_parts_side_by_side(activation: InputKind, strategy: Strategy) -> None:
    scale = 0.05 if activation == "static" else None
    parts = [
        int8(rand(N, K) * 10, activation, rand(N), strategy, scale),
        int8(rand(8, K, seed=1), activation, None, strategy, scale),
    ]
    fused = int8_of(fuse(parts))
    x = rand(T, K, seed=2)
    assert fused.shape == (N + 8, K)
    assert fused.weight_scale.shape == (N + 8,)
    assert torch.equal(fused(x), torch.cat([part(x) for part in parts], dim=1))


def test_fused_static_scale_is_the_largest() -> None:
    parts = [int8(rand(N, K), "static", input_scale=scale) for scale in (0.1, 0.4, 0.2)]
    assert present(int8_of(fuse(parts)).input_codes.scale).tolist() == pytest.approx([0.4])


def test_fused_float_is_its_parts_side_by_side() -> None:
    parts = [FloatLinear(rand(N, K)), FloatLinear(rand(8, K, seed=1), rand(8))]
    x = rand(T, K, seed=2)
    torch.testing.assert_close(fuse(parts)(x), torch.cat([part(x) for part in parts], dim=1))
    assert fuse(parts[:1]).bias is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (list, "empty"),
        (lambda: [FloatLinear(rand(N, K)), FloatLinear(rand(N, K + 1))], r"K = \[32, 33\]"),
    ],
)
def test_fuse_refuses_what_does_not_fit(parts: Callable[[], list[FloatLinear | Int8Linear]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse(parts())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: [FloatLinear(rand(N, K)), int8(rand(N, K))], "1 float with 1 int8"),
        (lambda: [int8(rand(N, K), "token"), int8(rand(N, K), "tensor")], "different activation: token, tensor"),
        (lambda: [FloatLinear(rand(N, K)), FloatLinear(rand(N, K).half())], "different dtype"),
    ],
)
def test_fuse_refuses_parts_that_are_quantized_apart(
    parts: Callable[[], list[FloatLinear | Int8Linear]], message: str
) -> None:
    with pytest.raises(UnlikeLinears, match=message):
        fuse(parts())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_q": torch.zeros(N, K)}, "must be int8"),
        ({"weight_q": torch.zeros(K, dtype=torch.int8)}, r"\[N, K\]"),
        ({"weight_scale": torch.ones(N - 1)}, r"float32 \[24\] or \[1\]"),
        ({"weight_scale": torch.ones(N).half()}, "torch.float16"),
        ({"bias": torch.ones(3)}, r"bias must be \[24\], got \[3\]"),
        ({"activation": "static"}, "static alone takes one"),
        ({"input_scale": torch.ones(1)}, "static alone takes one"),
        ({"activation": "static", "input_scale": torch.ones(2)}, r"input_scale must be float32 \[1\]"),
    ],
)
def test_int8_linear_refuses_a_wrong_operand(change: dict[str, Any], message: str) -> None:
    operands = {
        "weight_q": torch.zeros(N, K, dtype=torch.int8),
        "weight_scale": torch.ones(N),
        "bias": None,
        "activation": "token",
        "input_scale": None,
        "out_dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        int8_linear(**(operands | change))


def test_codes_of_minus_128_from_other_tools_are_multiplied_exactly() -> None:
    codes = torch.full((N, K), -128, dtype=torch.int8)
    linear = int8_linear(codes, torch.ones(N), None, "token", None, torch.float32)
    x_q = Quantized(torch.full((T, K), 127, dtype=torch.int8), torch.ones(T))
    assert torch.equal(linear(x_q), torch.full((T, N), -128.0 * 127 * K))


def test_rows_of_gate_and_up_in_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (6, 16), generator=generator, dtype=torch.int8)
    linear = int8_linear(codes, torch.rand(6), torch.rand(6), "token", None, torch.float32)
    pairs = int8_of(_in_pairs(linear))
    assert torch.equal(pairs.weight_q, codes[[0, 3, 1, 4, 2, 5]])
    assert torch.equal(present(pairs.bias)[::2], present(linear.bias)[:3])
    back = take_rows(pairs, torch.arange(6).view(-1, 2).t().flatten())
    for name in ("weight_q", "weight_scale", "bias"):
        assert torch.equal(getattr(back, name), getattr(linear, name))


@pytest.mark.parametrize("output_format", [None, ToInt8(), ToInt8(torch.tensor([0.1]))], ids=["float", "row", "static"])
def test_gated_linear(output_format: ToInt8 | None) -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = (
        int8_linear(
            torch.randint(-127, 128, (24, 32), generator=generator, dtype=torch.int8),
            torch.rand(24, generator=generator) / 1000,
            None,
            "token",
            None,
            torch.float32,
        )
        for _ in range(2)
    )
    x = torch.randn(5, 32, generator=generator)
    gated = GatedLinear(gate, up, output_format)
    assert gated.input_format == gate.input_format
    got = gated(x)
    want = torch.nn.functional.silu(gate(x)) * up(x)
    if isinstance(got, Quantized):
        assert output_format is not None
        scale = got.scale
        got = got.codes * scale.reshape(-1, 1)
        torch.testing.assert_close(got, want, atol=0.51 * scale.max().item(), rtol=0)
    else:
        torch.testing.assert_close(got, want)
    floats = [FloatLinear(part.weight_q * part.weight_scale[:, None]) for part in (gate, up)]
    exact = torch.nn.functional.silu(floats[0](x)) * floats[1](x)
    torch.testing.assert_close(GatedLinear(floats[0], floats[1], None)(x), exact)


def test_gated_linear_refuses_unlike_parts() -> None:
    gate, up = FloatLinear(torch.ones(4, 8)), FloatLinear(torch.ones(6, 8))
    with pytest.raises(ValueError, match="one shape"):
        GatedLinear(gate, up, None)


@pytest.mark.gpu
def test_gated_linear_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(2)
    gate, up = (
        int8_linear(
            torch.randint(-127, 128, (256, 128), generator=generator, dtype=torch.int8),
            torch.rand(256, generator=generator) / 1000,
            torch.rand(256, generator=generator),
            "token",
            None,
            torch.float16,
        )
        for _ in range(2)
    )
    x = torch.randn(40, 128, generator=generator).half()
    on_cpu = GatedLinear(gate, up, None)
    want = floats_of(on_cpu(x)).float()
    there = GatedLinear(gate.to("cuda"), up.to("cuda"), None)
    assert there.is_paired
    assert not on_cpu.is_paired
    torch.testing.assert_close(
        floats_of(there(x.cuda())).float().cpu(), want, rtol=2e-3, atol=1e-3 * want.abs().max().item()
    )


def grouped(n: int = N, bias: torch.Tensor | None = None, groups: int = 2, seed: int = 0) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, 64), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, groups, generator=generator) / 1000
    return int8_linear(codes, scale, bias, "token", None, torch.float32)


def asymmetric(
    scale: float, zero_point: int, bias: Tensor | None = None, weight_scale: torch.Tensor | None = None, seed: int = 0
) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (N, 64), generator=generator, dtype=torch.int8)
    weight_scale = torch.rand(N, generator=generator) / 1000 if weight_scale is None else weight_scale
    point = torch.tensor([zero_point], dtype=torch.int8)
    return int8_linear(codes, weight_scale, bias, "static", torch.tensor([scale]), torch.float32, point)


def mixed(n: int = N, threshold: float = 6.0, seed: int = 0) -> Int8Linear:
    codes, scale = quantize_weight(rand(n, 64, seed=seed), ScaleRule("channel", torch.float32))
    return int8_linear(codes, scale.reshape(-1), rand(n, seed=1), "token", None, torch.float32, outliers=threshold)


def real_weight(linear: Int8Linear) -> torch.Tensor:
    """[N, K] float64 of one scale per matrix, row or group."""
    groups = linear.weight_scale.reshape(-1, 1 if linear.weight_scale.ndim == 1 else linear.weight_scale.shape[1])
    return linear.weight_q.double() * groups.double().repeat_interleave(linear.shape[1] // groups.shape[1], dim=1)


def test_group_scales() -> None:
    bias, residual, x = rand(N), rand(T, N, seed=1), rand(T, 64, seed=2)
    linear = grouped(bias=bias)
    x_q = quantize_rows(x)
    want = x_q.codes.double() * x_q.scale.double()[:, None] @ real_weight(linear).T + bias + residual
    torch.testing.assert_close(linear(x, residual).double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear(x_q, residual), linear(x, residual))
    assert linear.input_format == ToInt8()
    assert linear.weight_bytes == N * 64 + 4 * N * 2 + 4 * N
    assert linear.is_row_independent
    assert linear.to("meta").weight_scale.is_meta


@pytest.mark.parametrize("weight_scale", [torch.rand(N) / 900, torch.full((1,), 0.002), torch.rand(N, 2) / 900])
@pytest.mark.parametrize("has_bias", [True, False])
def test_zero_point_leaves_through_the_bias(weight_scale: Tensor, has_bias: bool) -> None:
    """Exactly what the codes less the zero point give: x of a range that is not symmetric, and beyond it."""
    linear = asymmetric(0.03, -77, rand(N) if has_bias else None, weight_scale)
    x = rand(T, 64, seed=1) + 2
    x[0, 0], x[1, 1] = 100, -100
    codes = quantize_tensor(x, linear.input_codes.scale, linear.input_codes.zero_point).codes
    assert (codes.min().item(), codes.max().item()) == (-128, 127)
    want = (codes.double() + 77) * present(linear.input_codes.scale).double() @ real_weight(linear).T
    want = want + present(linear.bias) if has_bias else want
    y = linear(x)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    assert present(linear.added_bias).dtype == torch.float32
    without = int8_linear(linear.weight_q, weight_scale, linear.bias, "static", linear.input_codes.scale, torch.float32)
    assert not torch.allclose(without(x).double(), want, rtol=1e-2, atol=1e-2)


def test_zero_point_asks_for_floats() -> None:
    linear = asymmetric(0.03, 5)
    assert linear.input_format is None
    assert linear.is_row_independent
    with pytest.raises(TypeError, match="zero point takes a float tensor"):
        linear(quantize_rows(rand(T, 64)))
    moved = linear.to("meta")
    assert present(moved.input_codes.zero_point).is_meta
    assert present(moved.added_bias).is_meta


def test_outliers_are_multiplied_in_float() -> None:
    x = rand(T, 64, seed=2)
    x[1, 7], x[4, 60] = 500, -6
    linear, residual = mixed(), rand(T, N, seed=3)
    exact = x.double() @ real_weight(linear).T + present(linear.bias) + residual
    token = int8_linear(linear.weight_q, linear.weight_scale, linear.bias, "token", None, torch.float32)
    error, without = ((some(x, residual) - exact).abs().max().item() for some in (linear, token))
    # Half a step of a row whose largest magnitude is then that of a normal value, in each of 64 products.
    assert error < 64 * 0.5 * 6 / 127 * real_weight(linear).abs().max().item()
    assert without > 10 * error
    assert linear.input_format is None
    assert not linear.is_row_independent
    with pytest.raises(TypeError, match="outliers or a zero point takes a float tensor"):
        linear(quantize_rows(x))
    assert linear.to("meta").input_codes.outliers == 6.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_scale": torch.ones(N, 3)}, "a power of two from 32"),
        ({"weight_scale": torch.ones(N - 1, 2)}, "a power of two from 32"),
        ({"weight_scale": torch.ones(N, 2).half()}, "torch.float16"),
        ({"activation": "tensor", "outliers": 6.0}, "outliers = 6.0 with activation 'tensor'"),
        ({"weight_scale": torch.ones(N, 2), "outliers": 6.0}, r"weight_scale \[24, 2\]"),
        ({"outliers": 0.0}, "a threshold above 0"),
        ({"input_zero_point": torch.ones(1, dtype=torch.int8)}, "input_zero_point .* static alone"),
        (
            {"activation": "static", "input_scale": torch.ones(1), "input_zero_point": torch.ones(1)},
            "input_zero_point must be int8",
        ),
        (
            {
                "activation": "static",
                "input_scale": torch.ones(1),
                "input_zero_point": torch.ones(2, dtype=torch.int8),
            },
            r"int8 \[1\]",
        ),
    ],
)
def test_int8_linear_refuses_what_does_not_go_together(arguments: dict[str, Any], message: str) -> None:
    operands = {
        "weight_q": torch.zeros(N, 64, dtype=torch.int8),
        "weight_scale": torch.ones(N),
        "bias": None,
        "activation": "token",
        "input_scale": None,
        "out_dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        int8_linear(**(operands | arguments))


@pytest.mark.parametrize("make", [grouped, mixed], ids=["groups", "outliers"])
def test_fused_methods_are_their_parts_side_by_side(make: Callable[..., Int8Linear]) -> None:
    parts = [make(N), make(8, seed=1)]
    x = rand(T, 64, seed=2)
    x[2, 5] = 30
    got, want = fuse(parts)(x), torch.cat([part(x) for part in parts], dim=1)
    # The outliers' float product may sum in another order in another width.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert make is mixed or torch.equal(got, want)


def test_fused_zero_points_that_agree_are_kept() -> None:
    parts = [asymmetric(0.03, -77, rand(N)), asymmetric(0.03, -77, seed=1)]
    x, fused = rand(T, 64, seed=2) + 2, int8_of(fuse(parts))
    assert torch.equal(fused(x), torch.cat([part(x) for part in parts], dim=1))
    assert (present(fused.input_codes.scale).item(), present(fused.input_codes.zero_point).item()) == (
        present(parts[0].input_codes.scale).item(),
        -77,
    )


def test_fused_zero_points_hold_the_range_of_every_part() -> None:
    """Ranges -0.51 .. 7.14, -3.84 .. 3.81 and, symmetric, -1.27 .. 1.27: together -3.84 .. 7.14."""
    symmetric = int8_linear(
        torch.ones(N, 64, dtype=torch.int8), torch.ones(N), None, "static", torch.tensor([0.01]), torch.float32
    )
    parts = [asymmetric(0.03, -111, rand(N)), asymmetric(0.03, 0, seed=1), symmetric]
    fused = int8_of(fuse(parts))
    scale, zero_point = present(fused.input_codes.scale).item(), present(fused.input_codes.zero_point).item()
    assert scale == pytest.approx((7.14 + 3.84) / 255)
    assert zero_point == round(-128 + 3.84 / scale)
    x = torch.linspace(-3.84, 7.14, T * 64).reshape(T, 64)
    codes = quantize_tensor(x, fused.input_codes.scale, fused.input_codes.zero_point).codes
    # The zero point is whole, so that the ends of the range may lie half a step beyond the codes, on top of rounding.
    assert ((codes.double() - zero_point) * scale - x).abs().max().item() <= scale * 1.001
    exact = x.double() @ torch.cat([real_weight(part) for part in parts]).T
    exact[:, :N] += present(parts[0].bias)
    weights = torch.cat([real_weight(part) for part in parts]).abs().sum(1)
    assert ((fused(x) - exact).abs() <= 1.001 * scale * weights + 1e-4).all()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: [grouped(), grouped(groups=1)], "different number of groups: 2, 1"),
        (lambda: [mixed(), mixed(threshold=5.0)], "different outliers: 6.0, 5.0"),
        (
            lambda: [
                mixed(),
                int8_linear(torch.ones(N, 64).to(torch.int8), torch.ones(N), None, "token", None, torch.float32),
            ],
            "different outliers: 6.0, None",
        ),
    ],
)
def test_fuse_refuses_methods_that_differ(parts: Callable[[], list[FloatLinear | Int8Linear]], message: str) -> None:
    with pytest.raises(UnlikeLinears, match=message):
        fuse(parts())


@pytest.mark.parametrize("make", [grouped, mixed, lambda seed=0: asymmetric(0.03, -77, rand(N), seed=seed)])
def test_gated_linear_of_every_method(make: Callable[..., Int8Linear]) -> None:
    gate, up = make(), make(seed=1)
    x = rand(T, 64, seed=2)
    x[2, 5] = 7
    gated = GatedLinear(gate, up, None)
    assert gated.input_format == gate.input_format
    torch.testing.assert_close(gated(x), torch.nn.functional.silu(gate(x)) * up(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [grouped, mixed, lambda seed=0: asymmetric(0.03, -77, rand(N), seed=seed)])
def test_gated_linear_of_every_method_on_a_gpu(make: Callable[..., Int8Linear]) -> None:
    gate, up = make(), make(seed=1)
    x = rand(T, 64, seed=2)
    x[2, 5] = 7
    want, there = GatedLinear(gate, up, None)(x), GatedLinear(gate.to("cuda"), up.to("cuda"), None)
    assert there.is_paired == gate.has_gated_kernel
    torch.testing.assert_close(floats_of(there(x.cuda())).cpu(), want, rtol=1e-4, atol=1e-4)
