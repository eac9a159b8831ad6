from __future__ import annotations

import pytest
import torch

from kernels import Quantized, ToInt8, quantize_rows, quantize_tensor
from quant.convert import quantize_weight
from quant.linear import FloatLinear, GatedLinear, Int8Linear, _reorder, fuse

N, K, T = 24, 32, 5


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(weight, activation="token", bias=None, strategy="channel", input_scale=None, out_dtype=torch.float32):
    codes, scale = quantize_weight(weight, strategy, torch.float32)
    static = torch.tensor([input_scale]) if input_scale is not None else None
    return Int8Linear(codes, scale.reshape(-1), bias, activation, static, out_dtype)


def dequantized(linear: Int8Linear) -> torch.Tensor:
    return linear.weight_q.double() * linear.weight_scale.double()[:, None]


@pytest.mark.parametrize(
    ("activation", "input_scale"),
    [("token", None), ("tensor", None), ("static", 0.03)],
    ids=["token", "tensor", "static"],
)
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int8_is_the_product_of_the_dequantized_operands(activation, input_scale, strategy):
    x, residual, bias = rand(T, K, seed=1), rand(T, N, seed=2), rand(N, seed=3)
    linear = int8(rand(N, K), activation, bias, strategy, input_scale)
    x_q = quantize_rows(x) if activation == "token" else quantize_tensor(x, linear.input_scale)
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


def test_input_format_says_what_the_op_before_should_write():
    weight = rand(N, K)
    assert FloatLinear(weight).input_format is None
    assert int8(weight, "tensor").input_format is None
    assert int8(weight, "token").input_format == ToInt8()
    static = int8(weight, "static", input_scale=0.5)
    assert static.input_format.scale is static.input_scale


def test_float_linear_adds_bias_and_residual():
    weight, bias, x, residual = rand(N, K), rand(N, seed=1), rand(T, K, seed=2), rand(T, N, seed=3)
    torch.testing.assert_close(FloatLinear(weight, bias)(x, residual), x @ weight.T + bias + residual)
    with pytest.raises(TypeError, match="input_format"):
        FloatLinear(weight)(quantize_rows(x))


def test_shape_bytes_and_device():
    linear = int8(rand(N, K), "static", rand(N), input_scale=0.5)
    assert linear.shape == (N, K)
    assert linear.weight_bytes == N * K + 4 * N + 4 * N + 4
    assert FloatLinear(rand(N, K).bfloat16()).weight_bytes == 2 * N * K
    moved = linear.to("meta")
    assert moved.weight_q.is_meta
    assert moved.input_format.scale is moved.input_scale
    assert FloatLinear(rand(N, K), rand(N)).to("meta").bias.is_meta


@pytest.mark.parametrize("activation", ["token", "tensor", "static"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fused_int8_is_its_parts_side_by_side(activation, strategy):
    scale = 0.05 if activation == "static" else None
    parts = [
        int8(rand(N, K) * 10, activation, rand(N), strategy, scale),
        int8(rand(8, K, seed=1), activation, None, strategy, scale),
    ]
    fused = fuse(parts)
    x = rand(T, K, seed=2)
    assert fused.shape == (N + 8, K)
    assert fused.weight_scale.shape == (N + 8,)
    assert torch.equal(fused(x), torch.cat([part(x) for part in parts], dim=1))


def test_fused_static_scale_is_the_largest():
    parts = [int8(rand(N, K), "static", input_scale=scale) for scale in (0.1, 0.4, 0.2)]
    assert fuse(parts).input_scale.tolist() == pytest.approx([0.4])


def test_fused_float_is_its_parts_side_by_side():
    parts = [FloatLinear(rand(N, K)), FloatLinear(rand(8, K, seed=1), rand(8))]
    x = rand(T, K, seed=2)
    torch.testing.assert_close(fuse(parts)(x), torch.cat([part(x) for part in parts], dim=1))
    assert fuse(parts[:1]).bias is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (list, "empty"),
        (lambda: [FloatLinear(rand(N, K)), int8(rand(N, K))], "1 float with 1 int8"),
        (lambda: [FloatLinear(rand(N, K)), FloatLinear(rand(N, K + 1))], r"K = \[32, 33\]"),
        (lambda: [int8(rand(N, K), "token"), int8(rand(N, K), "tensor")], "different activation: token, tensor"),
        (lambda: [FloatLinear(rand(N, K)), FloatLinear(rand(N, K).half())], "different dtype"),
    ],
)
def test_fuse_refuses_what_does_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
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
def test_int8_linear_refuses_a_wrong_operand(change, message):
    operands = {
        "weight_q": torch.zeros(N, K, dtype=torch.int8),
        "weight_scale": torch.ones(N),
        "bias": None,
        "activation": "token",
        "input_scale": None,
        "out_dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        Int8Linear(**(operands | change))


def test_codes_of_minus_128_from_other_tools_are_multiplied_exactly():
    codes = torch.full((N, K), -128, dtype=torch.int8)
    linear = Int8Linear(codes, torch.ones(N), None, "token", None, torch.float32)
    x_q = Quantized(torch.full((T, K), 127, dtype=torch.int8), torch.ones(T))
    assert torch.equal(linear(x_q), torch.full((T, N), -128.0 * 127 * K))


def test_pairs_of_rows_and_back():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (6, 16), generator=generator, dtype=torch.int8)
    linear = Int8Linear(codes, torch.rand(6), torch.rand(6), "token", None, torch.float32)
    pairs = _reorder(linear, (2, -1))
    assert torch.equal(pairs.weight_q, codes[[0, 3, 1, 4, 2, 5]])
    assert torch.equal(pairs.bias[::2], linear.bias[:3])
    back = _reorder(pairs, (-1, 2))
    for name in ("weight_q", "weight_scale", "bias"):
        assert torch.equal(getattr(back, name), getattr(linear, name))


@pytest.mark.parametrize("output_format", [None, ToInt8(), ToInt8(torch.tensor([0.1]))], ids=["float", "row", "static"])
def test_gated_linear(output_format):
    generator = torch.Generator().manual_seed(1)
    gate, up = (
        Int8Linear(
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
    torch.testing.assert_close(GatedLinear(gate, up, None).to("cpu")(x), want)
    floats = [FloatLinear(part.weight_q * part.weight_scale[:, None]) for part in (gate, up)]
    exact = torch.nn.functional.silu(floats[0](x)) * floats[1](x)
    torch.testing.assert_close(GatedLinear(*floats, None)(x), exact)


def test_gated_linear_refuses_unlike_parts():
    gate, up = FloatLinear(torch.ones(4, 8)), FloatLinear(torch.ones(6, 8))
    with pytest.raises(ValueError, match="one shape"):
        GatedLinear(gate, up, None)


@pytest.mark.gpu
def test_gated_linear_on_a_gpu():
    generator = torch.Generator().manual_seed(2)
    gate, up = (
        Int8Linear(
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
    want = on_cpu(x).float()
    for there in (on_cpu.to("cuda"), GatedLinear(gate.to("cuda"), up.to("cuda"), None)):
        assert there.is_paired
        torch.testing.assert_close(there(x.cuda()).float().cpu(), want, rtol=2e-3, atol=1e-3 * want.abs().max().item())
    assert not on_cpu.to("cuda").to("cpu").is_paired
    assert torch.equal(on_cpu.to("cuda").to("cpu")(x).float(), want)
