"""What we write, read by transformers with compressed-tensors; what llm-compressor's conventions give, read by us."""

from __future__ import annotations

import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels import Quantized
from quant.checkpoint import Checkpoint
from quant.linear import Int8Linear
from quant.scheme import PRESETS

pytest.importorskip("compressed_tensors")
helpers = importlib.import_module("compressed_tensors.quantization.utils.helpers")
forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")

INT8 = [scheme for scheme in PRESETS.values() if scheme.is_int8]


def load(folder):
    """The oracle in float32: in 16 bits it rounds x / scale and the dequantized weight to 8 bits of mantissa."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def dequantized(linear: Int8Linear) -> torch.Tensor:
    return linear.weight_q.float() * linear.weight_scale.reshape(-1, 1)


def oracle_codes(x: torch.Tensor, linear: Int8Linear) -> Quantized:
    """Codes by compressed-tensors' rule: a dynamic scale of absmax / 127.5, and -128 allowed."""
    if linear.activation == "static":
        scale = linear.input_scale
    else:
        absmax = x.abs().amax(-1) if linear.activation == "token" else x.abs().amax().reshape(1)
        scale = absmax / 127.5
    return Quantized((x / scale[:, None]).clamp(-128, 127).round().to(torch.int8), scale)


def keep(name, inputs, outputs):
    def hook(_module, args, out):
        inputs[name], outputs[name] = args[0][0], out[0]

    return hook


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
def test_every_linear_agrees_with_transformers(tiny, tmp_path, scheme, dtype):
    out = tiny.quantize(tmp_path / "out", scheme, dtype)
    oracle = load(out)
    checkpoint = Checkpoint.open(out, torch.float32, "cpu")
    inputs, outputs = {}, {}
    for name in tiny.linear_names:
        oracle.get_submodule(name).register_forward_hook(
            lambda _m, args, out, name=name: (
                (inputs.update({name: args[0][0]}), outputs.update({name: out[0]}))[0] and None
            )
        )
    with torch.inference_mode():
        oracle(torch.arange(32)[None])
    for name in tiny.linear_names:
        module = oracle.get_submodule(name)
        linear = checkpoint.linear(name, *module.weight.shape, has_bias=False)
        assert torch.equal(module.weight, dequantized(linear)), name
        # Given the oracle's codes the product is the same: scales, codes and bias mean what they mean to others.
        same = linear(oracle_codes(inputs[name], linear))
        torch.testing.assert_close(same, outputs[name], rtol=1e-4, atol=1e-4 * outputs[name].abs().max().item())
        # With our own codes (absmax / 127) it differs by rounding alone.
        ours = linear(inputs[name])
        assert (ours - outputs[name]).norm() / outputs[name].norm() < 0.02, name


def int8_forward(model, checkpoint):
    """Run our Linears inside the float model's graph."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            linear = checkpoint.linear(name, *module.weight.shape, has_bias=False)
            module.forward = lambda x, linear=linear: linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
    return model


@pytest.fixture
def range_of_127(monkeypatch):
    """The oracle with codes in -127..127: its dynamic scale, absmax / (range / 2), is then absmax / 127 as ours is."""
    ends = torch.tensor(-127.0), torch.tensor(127.0)
    for module in (helpers, forward):
        monkeypatch.setattr(module, "calculate_range", lambda _args, _device: ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
def test_the_whole_model_is_the_oracle_s_where_ranges_agree(tiny, tmp_path, scheme, dtype, range_of_127):
    ours, theirs, _ = logits_of_both(tiny, tiny.quantize(tmp_path / "out", scheme, dtype))
    # A code on a tie may fall either way after a float sum in another order; nothing else differs.
    assert (ours - theirs).norm() / theirs.norm() < 5e-3
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
def test_the_whole_model_is_near_the_oracle_as_it_comes(tiny, tmp_path, scheme):
    """Its divisor 127.5 and its code -128 move logits less than quantization itself does."""
    ours, theirs, exact = logits_of_both(tiny, tiny.quantize(tmp_path / "out", scheme))
    assert (ours - theirs).norm() < 1.5 * (theirs - exact).norm()
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


def logits_of_both(tiny, folder):
    checkpoint = Checkpoint.open(folder, torch.float32, "cpu")
    ids = torch.arange(32)[None]
    model = load(folder)
    with torch.inference_mode():
        exact = tiny.model(ids).logits[0]
        theirs = model(ids).logits[0]
        ours = int8_forward(model, checkpoint)(ids).logits[0]
    return ours, theirs, exact
