"""Linears and tensors of a folder: read whole, or refused by name. The folders are llm-compressor's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant.checkpoint.notes import NOTES_NAME
from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from quant.linear import FloatLinear, Int8Linear
from quant.scheme import ActivationScale, Scheme, WeightScale
from tests.quant.fixtures import DOWN, FIXTURES, SHAPE, copy_of, drop, edit, put
from tests.support.narrowed import float_of, int8_of, present
from tests.support.tiny_llama import Tiny


def open_(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, torch.float32, "cpu")


@pytest.fixture
def w8a8(tmp_path: Path) -> Path:
    return copy_of("dynamic", tmp_path)


@pytest.fixture
def rtn(tmp_path: Path) -> Path:
    return copy_of("static", tmp_path)


@pytest.fixture
def asymmetric(tmp_path: Path) -> Path:
    return copy_of("static-asymmetric", tmp_path)


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    return copy_of("group", tmp_path)


def test_a_float_folder(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny.folder, torch.bfloat16, "cpu")
    assert checkpoint.quantization is None
    assert checkpoint.scheme_name is None
    assert checkpoint.config["model_type"] == "llama"
    linear = checkpoint.linear(DOWN, 64, 96, has_bias=False)
    assert isinstance(linear, FloatLinear)
    assert linear.weight.dtype == torch.bfloat16
    assert "lm_head.weight" not in checkpoint.files
    assert f"{DOWN}.weight" in checkpoint.files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{DOWN}.weight"), r"has no tensor model\.layers\.0\.mlp\.down_proj\.weight"),
        (drop(f"{DOWN}.weight_scale"), r"has no tensor .*down_proj\.weight_scale"),
        (put(f"{DOWN}.weight", torch.zeros(32, 63, dtype=torch.int8)), r"has shape \[32, 63\], expected \[32, 64\]"),
        (put(f"{DOWN}.weight", torch.zeros(32, 64)), "is stored as float32, expected int8"),
        (put(f"{DOWN}.weight_scale", torch.ones(31, 1)), r"has shape \[31, 1\], expected \[32, 1\]"),
        (put(f"{DOWN}.weight_scale", torch.ones(8, 4)), r"has shape \[8, 4\], expected \[32, 1\]"),
        (put(f"{DOWN}.weight_scale", torch.ones(32, 1, dtype=torch.int32)), "is int32, expected float"),
        (put(f"{DOWN}.weight_scale", torch.zeros(32, 1)), "not positive and finite"),
        (put(f"{DOWN}.weight_scale", torch.full((32, 1), float("nan"))), "not positive and finite"),
        (put(f"{DOWN}.input_scale", torch.ones(1)), r"down_proj\.input_scale would be loaded and never used"),
        (put(f"{DOWN}.weight_zero_point", torch.ones(32, 1, dtype=torch.int8)), "is not zero though .* symmetric"),
        (put(f"{DOWN}.weight_g_idx", torch.ones(64, dtype=torch.int32)), "weight_g_idx would be loaded and never used"),
        (put(f"{DOWN}.output_scale", torch.ones(1)), "output_scale would be loaded and never used"),
        (put(f"{DOWN}.bias", torch.ones(32)), "bias would be loaded and never used"),
    ],
)
def test_a_linear_that_does_not_fit(w8a8: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    edit(w8a8, change)
    checkpoint = open_(w8a8)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.linear(DOWN, *SHAPE, has_bias=False)


def test_a_missing_bias(w8a8: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor .*down_proj\.bias"):
        open_(w8a8).linear(DOWN, *SHAPE, has_bias=True)


def test_a_static_scheme_without_its_scale(rtn: Path) -> None:
    edit(rtn, drop(f"{DOWN}.input_scale"))
    with pytest.raises(CheckpointError, match=r"has no tensor .*down_proj\.input_scale"):
        open_(rtn).linear(DOWN, *SHAPE, has_bias=False)


def test_int8_weights_that_config_does_not_name_are_never_read_as_floats(w8a8: Path) -> None:
    edit(w8a8, change_config=lambda quantization: quantization.update(ignore=["lm_head", DOWN]))
    with pytest.raises(CheckpointError, match=r"is stored as int8, expected float; config\.json does not list it"):
        open_(w8a8).linear(DOWN, *SHAPE, has_bias=False)


def test_a_float_tensor_of_another_shape(w8a8: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[32\], expected \[33\]"):
        open_(w8a8).tensor("model.norm.weight", (33,))


def test_a_float_beyond_float16(w8a8: Path) -> None:
    edit(w8a8, put("model.norm.weight", torch.full((32,), 1e5)))
    with pytest.raises(CheckpointError, match="beyond float16's 65504; use bfloat16"):
        Checkpoint.open(w8a8, torch.float16, "cpu").tensor("model.norm.weight", (32,))


@pytest.mark.parametrize("value", [65519.0, -65519.0, 65520.0, -65520.0])
def test_float16_takes_what_it_rounds_to_its_largest(w8a8: Path, value: float) -> None:
    edit(w8a8, put("model.norm.weight", torch.tensor([value] + [1.0] * 31)))
    checkpoint = Checkpoint.open(w8a8, torch.float16, "cpu")
    if abs(value) < 65520:
        assert checkpoint.tensor("model.norm.weight", (32,))[0] == value / abs(value) * 65504
    else:
        with pytest.raises(CheckpointError, match="reaches 65520, beyond float16's 65504"):
            checkpoint.tensor("model.norm.weight", (32,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_value_that_is_not_finite(w8a8: Path, value: float, stored: torch.dtype, dtype: torch.dtype) -> None:
    """One of a thousand, as it may be in the row of a token that no check reads."""
    edit(w8a8, put("model.norm.weight", torch.ones(1000, dtype=stored).index_fill(0, torch.tensor([700]), value)))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinite values; download"):
        Checkpoint.open(w8a8, dtype, "cpu").tensor("model.norm.weight", (1000,))


@pytest.mark.parametrize("scale_shape", [(32,), (32, 1)], ids=str)
def test_scales_and_zero_points_as_other_tools_store_them(w8a8: Path, scale_shape: tuple[int, ...]) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state[f"{DOWN}.weight_scale"] = state[f"{DOWN}.weight_scale"].reshape(scale_shape).half()
        state[f"{DOWN}.weight_zero_point"] = torch.zeros(32, 1, dtype=torch.int8)
        state[f"{DOWN}.weight"][0, 0] = -128

    edit(w8a8, change)
    linear = open_(w8a8).linear(DOWN, *SHAPE, has_bias=False)
    assert isinstance(linear, Int8Linear)
    assert linear.weight_q[0, 0] == -128
    assert linear.weight_scale.dtype == torch.float32
    assert linear.weight_scale.shape == (32,)


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)], ids=str)
def test_one_scale_in_every_shape(rtn: Path, scale_shape: tuple[int, ...]) -> None:
    def change(state: dict[str, Tensor]) -> None:
        for kind in ("weight_scale", "input_scale"):
            state[f"{DOWN}.{kind}"] = state[f"{DOWN}.{kind}"].reshape(scale_shape)

    edit(rtn, change)
    linear = int8_of(open_(rtn).linear(DOWN, *SHAPE, has_bias=False))
    assert linear.weight_scale.shape == present(linear.input_codes.scale).shape == (1,)


# --- zero points, groups, transposed codes -----------------------------------------------------------------------


def test_an_asymmetric_scheme_reads_its_zero_point(asymmetric: Path) -> None:
    stored = load_file(asymmetric / "model.safetensors")[f"{DOWN}.input_zero_point"]
    assert stored.item() != 0
    linear = int8_of(open_(asymmetric).linear(DOWN, *SHAPE, has_bias=False))
    assert torch.equal(present(linear.input_codes.zero_point), stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{DOWN}.input_zero_point"), r"has no tensor .*down_proj\.input_zero_point"),
        (put(f"{DOWN}.input_zero_point", torch.zeros(2, dtype=torch.int8)), r"is int8 \[2\], expected int8 \[1\]"),
        (put(f"{DOWN}.input_zero_point", torch.zeros(1)), r"is float32 \[1\], expected int8 \[1\]"),
    ],
)
def test_a_zero_point_that_does_not_fit(
    asymmetric: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit(asymmetric, change)
    with pytest.raises(CheckpointError, match=message):
        open_(asymmetric).linear(DOWN, *SHAPE, has_bias=False)


def test_groups_have_scales_by_row_and_group(grouped: Path) -> None:
    stored = load_file(grouped / "model.safetensors")
    linear = int8_of(open_(grouped).linear(DOWN, *SHAPE, has_bias=False))
    assert torch.equal(linear.weight_scale, stored[f"{DOWN}.weight_scale"].float())
    assert linear.weight_scale.shape == (32, 2)
    # A matrix of one group is one with a scale per channel.
    q = "model.layers.0.self_attn.q_proj"
    assert int8_of(open_(grouped).linear(q, 64, 32, has_bias=False)).weight_scale.shape == (64,)


@pytest.mark.parametrize("shape", [(32, 1), (2, 32), (64,)], ids=str)
def test_scales_of_other_groups_than_config_says(grouped: Path, shape: tuple[int, ...]) -> None:
    edit(grouped, put(f"{DOWN}.weight_scale", torch.ones(shape)))
    with pytest.raises(CheckpointError, match=r"weight_scale has shape \[.*, expected \[32, 2\]"):
        open_(grouped).linear(DOWN, *SHAPE, has_bias=False)


def test_groups_that_do_not_divide_the_inputs(grouped: Path) -> None:
    edit(grouped, put(f"{DOWN}.weight", torch.zeros(32, 48, dtype=torch.int8)))
    with pytest.raises(CheckpointError, match="has 48 inputs, which groups of 32 do not divide"):
        open_(grouped).linear(DOWN, 32, 48, has_bias=False)


@pytest.mark.parametrize("name", ["dynamic", "static", "static-asymmetric", "group"])
def test_codes_stored_the_other_way_round(name: str, tmp_path: Path) -> None:
    folder = edit(
        copy_of(name, tmp_path),
        lambda state: state.update({f"{DOWN}.weight": state[f"{DOWN}.weight"].t().contiguous()}),
    )
    turned = int8_of(open_(folder).linear(DOWN, *SHAPE, has_bias=False, is_transposed=True))
    straight = int8_of(open_(FIXTURES / name).linear(DOWN, *SHAPE, has_bias=False))
    assert torch.equal(turned.weight_q, straight.weight_q)
    assert turned.weight_q.is_contiguous()
    assert torch.equal(turned.weight_scale, straight.weight_scale)
    with pytest.raises(CheckpointError, match=r"has shape \[64, 32\], expected \[32, 64\]"):
        open_(folder).linear(DOWN, *SHAPE, has_bias=False)


def test_a_float_matrix_stored_the_other_way_round(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(tiny.folder, torch.float32, "cpu")
    straight = checkpoint.tensor(f"{DOWN}.weight", (64, 96))
    assert torch.equal(float_of(checkpoint.linear(DOWN, 96, 64, False, is_transposed=True)).weight, straight.t())


# --- what the folder says of its scheme --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name", "scheme"),
    [
        ("dynamic", "int8 channel/token", ("channel", "token", None)),
        ("static", "int8 tensor/static", ("tensor", "static", None)),
        ("static-asymmetric", "int8 channel/static asymmetric", ("channel", "static", None)),
        ("smoothquant-gptq", "int8 channel/token", ("channel", "token", None)),
        ("group", "int8 group of 32/token", ("group", "token", 32)),
    ],
)
def test_a_folder_of_another_tool_is_named_after_its_scales(
    folder: str, name: str, scheme: tuple[WeightScale, ActivationScale, int | None]
) -> None:
    """Whether it was smoothed or rounded with care cannot be seen, so no method is claimed."""
    checkpoint = open_(FIXTURES / folder)
    assert checkpoint.scheme_name == name
    assert checkpoint.schemes == (Scheme(name, scheme[0], scheme[1], group_size=scheme[2]),)
    assert (checkpoint.kv, checkpoint.outliers) == ("float", None)


def test_a_folder_of_several_formats_has_a_scheme_for_each() -> None:
    checkpoint = open_(FIXTURES / "sharded-mixed")
    assert len(checkpoint.schemes) == 3
    assert checkpoint.scheme_name == "int8 channel/token + int8 tensor/tensor + int8 channel/static"


def test_our_notes_add_what_config_cannot_say(w8a8: Path) -> None:
    (w8a8 / NOTES_NAME).write_text(json.dumps({"scheme": "llm-int8", "outliers": 6.0, "kv": "int8"}))
    checkpoint = open_(w8a8)
    assert checkpoint.schemes == (Scheme("llm-int8", "channel", "token", outliers=6.0, kv="int8"),)
    assert int8_of(checkpoint.linear(DOWN, *SHAPE, has_bias=False)).input_codes.outliers == 6.0


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"outliers": "many"}, r"ottava\.json: outliers = 'many' is not served"),
        ({"outliers": -1}, "outliers = -1 is not served"),
        ({"outliers": 6.0, "alpha": 0.5}, "outliers = 6.0 with smoothing = 0.5 is not served"),
        ({"alpha": [1]}, r"smoothing = \[1\] is not served"),
        ({"kv": "int4"}, "kv = 'int4' is not served"),
        ({"rounding": {}}, r"rounding = \{\} is not served"),
    ],
)
def test_notes_that_no_scheme_takes(w8a8: Path, notes: dict[str, Any], message: str) -> None:
    (w8a8 / NOTES_NAME).write_text(json.dumps(notes))
    with pytest.raises(CheckpointError, match=f"{message}.*quantize the float model again"):
        open_(w8a8)


def test_outliers_of_a_static_scheme(rtn: Path) -> None:
    (rtn / NOTES_NAME).write_text(json.dumps({"outliers": 6.0}))
    with pytest.raises(CheckpointError, match=r"outliers = 6\.0 with activation = 'static' is not served"):
        open_(rtn)
