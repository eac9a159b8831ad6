"""What we write, read by transformers with compressed-tensors, in every form; what it computes and what we do."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels import Quantized
from quant.checkpoint.notes import NOTES_NAME
from quant.checkpoint.reader import Checkpoint
from quant.linear import FloatLinear, Int8Linear
from quant.scheme import Scheme
from tests.support.narrowed import int8_of, present
from tests.support.quant_oracle import limit_codes_to_127, load
from tests.support.tiny_llama import VOCAB, Tiny

FORMS = [
    Scheme(f"{weight}-{activation}", weight, activation, smoothing=0.5, group_size=32 if weight == "group" else None)
    for weight in ("tensor", "channel", "group")
    for activation in ("static", "tensor", "token")
]
MIXED = Scheme("llm-int8", "channel", "token", outliers=6.0)


def dequantized(linear: Int8Linear) -> torch.Tensor:
    num_groups = 1 if linear.weight_scale.ndim == 1 else linear.weight_scale.shape[1]
    scale = linear.weight_scale.reshape(-1, num_groups).repeat_interleave(linear.shape[1] // num_groups, 1)
    return linear.weight_q.float() * scale


def oracle_codes(x: torch.Tensor, linear: Int8Linear) -> Quantized:
    """Codes by compressed-tensors' rule: a dynamic scale of absmax / 127.5, and -128 allowed."""
    if linear.input_codes.kind == "static":
        scale = present(linear.input_codes.scale)
    else:
        absmax = x.abs().amax(-1) if linear.input_codes.kind == "token" else x.abs().amax().reshape(1)
        scale = absmax / 127.5
    return Quantized((x / scale[:, None]).clamp(-128, 127).round().to(torch.int8), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", FORMS, ids=lambda scheme: scheme.name)
def test_every_linear_agrees_with_transformers(tiny: Tiny, tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    out = tiny.quantize(tmp_path / "out", scheme, dtype)
    oracle = load(out)
    checkpoint = Checkpoint.open(out, torch.float32, "cpu")
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name in tiny.linear_names:
        oracle.get_submodule(name).register_forward_hook(
            lambda _module, args, y, name=name: inputs.update({name: args[0][0]}) or outputs.update({name: y[0]})
        )
    with torch.inference_mode():
        oracle(torch.arange(32)[None])
    for name in tiny.linear_names:
        module = oracle.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        num_rows, num_columns = module.weight.shape
        linear = int8_of(checkpoint.linear(name, num_rows, num_columns, has_bias=False))
        assert torch.equal(module.weight, dequantized(linear)), name
        # Given the oracle's codes the product is the same: scales, codes and bias mean what they mean to others.
        same = linear(oracle_codes(inputs[name], linear))
        torch.testing.assert_close(same, outputs[name], rtol=1e-4, atol=1e-4 * outputs[name].abs().max().item())
        # With our own codes (absmax / 127) it differs by rounding alone.
        ours = linear(inputs[name])
        assert (ours - outputs[name]).norm() / outputs[name].norm() < 0.02, name


def of_any_shape(linear: FloatLinear | Int8Linear, x: Tensor) -> Tensor:
    return torch.unflatten(linear(x.flatten(0, -2)), 0, x.shape[:-1])


def int8_forward(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """Run our Linears inside the float model's graph."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            num_rows, num_columns = module.weight.shape
            linear = checkpoint.linear(name, num_rows, num_columns, has_bias=False)
            vars(module)["forward"] = partial(of_any_shape, linear)
    return model


@pytest.fixture
def range_of_127(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_codes_to_127(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", FORMS, ids=lambda scheme: scheme.name)
def test_the_whole_model_is_the_oracle_s_where_ranges_agree(
    tiny: Tiny, tmp_path: Path, scheme: Scheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under static scales they agree as they come."""
    if scheme.activation != "static":
        limit_codes_to_127(monkeypatch)
    folder = tiny.quantize(tmp_path / "out", scheme, dtype)
    apart = []
    for seed in range(5):
        text = torch.randint(VOCAB, (1, 32), generator=torch.Generator().manual_seed(seed))
        ours, theirs, _ = logits_of_both(tiny, folder, text)
        apart.append(float((ours - theirs).norm() / theirs.norm()))
    # A code on a tie may fall either way after a float sum in another order, and the codes behind it with it; nothing
    # else differs, so that most texts meet none.
    assert sorted(apart)[2] < 1e-5, apart
    assert max(apart) < 0.05, apart


@pytest.mark.parametrize("scheme", FORMS, ids=lambda scheme: scheme.name)
def test_the_whole_model_is_near_the_oracle_as_it_comes(tiny: Tiny, tmp_path: Path, scheme: Scheme) -> None:
    """Its divisor 127.5 and its code -128 make its rounding another, not a worse one: two that have nothing in common
    lie sqrt(2) times as far apart as each does from the float model."""
    ours, theirs, exact = logits_of_both(tiny, tiny.quantize(tmp_path / "out", scheme))
    assert (ours - theirs).norm() < 1.5 * (theirs - exact).norm()


def test_outlier_columns_are_ours_alone(tiny: Tiny, tmp_path: Path, range_of_127: None) -> None:
    """LLM.int8()'s folder is W8A8 to others, and to us without our notes; with them, columns beyond 6 are float."""
    folder = tiny.quantize(tmp_path / "out", MIXED)
    mixed, theirs, exact = logits_of_both(tiny, folder)
    (folder / NOTES_NAME).unlink()
    plain, theirs, _ = logits_of_both(tiny, folder)
    assert (plain - theirs).norm() / theirs.norm() < 5e-3
    assert (mixed - exact).norm() < (plain - exact).norm()


def logits_of_both(tiny: Tiny, folder: Path, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    checkpoint = Checkpoint.open(folder, torch.float32, "cpu")
    ids = torch.arange(32)[None] if ids is None else ids
    model = load(folder)
    with torch.inference_mode():
        exact = tiny.model(ids).logits[0]
        theirs = model(ids).logits[0]
        ours = int8_forward(model, checkpoint)(ids).logits[0]
    return ours, theirs, exact
