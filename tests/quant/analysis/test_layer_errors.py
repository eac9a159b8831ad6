from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from quant.scheme import PRESETS, Scheme
from service.models.config import ModelConfig, linear_names
from service.store.quantized import quantize_model
from tests.support.layer_errors import CPU, SHORT, WINDOWS, errors
from tests.support.tiny_models import change_tensors, save_tiny_model

SMOOTHED = Scheme("w8a8", "channel", "token", smoothing=0.5)


def made(folder: Path, name: str, scheme: Scheme) -> tuple[Path, Path]:
    source = save_tiny_model(folder / "float", name)
    quantize_model(source, folder / "int8", scheme, SHORT, CPU)
    return source, folder / "int8"


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(tmp_path_factory.mktemp("smoothed"), "llama", SMOOTHED)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "qwen3_moe"])
def test_every_linear_is_listed_with_the_error_of_its_rounding(tmp_path: Path, name: str) -> None:
    source, int8 = made(tmp_path, name, SMOOTHED)
    seen: list[tuple[int, int]] = []
    found = errors(source, int8, SMOOTHED, on_progress=lambda done, total: seen.append((done, total)))
    assert sorted(row.name for row in found) == sorted(linear_names(ModelConfig.load(source)))
    assert [row.error for row in found] == sorted((row.error for row in found), reverse=True)
    # Smoothing is undone, or outputs of v and up would be off by far more than codes of 7 bits are.
    assert all(0.001 < row.error < 0.06 for row in found)
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_an_unsmoothed_error_is_the_definition(tmp_path: Path) -> None:
    """The first layer's q_proj, computed by hand from the embedding on."""
    scheme = PRESETS["rtn-token"]
    source, int8 = made(tmp_path, "llama", scheme)
    state, config = load_file(source / "model.safetensors"), ModelConfig.load(source)
    linear = "model.layers.0.self_attn.q_proj"
    hidden = state["model.embed_tokens.weight"].float()[WINDOWS[0]]
    x = nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=config.norm_eps)
    x = x * state["model.layers.0.input_layernorm.weight"].float()
    weight = state[f"{linear}.weight"].float()
    bias = state.get(f"{linear}.bias")
    y = nn.functional.linear(x, weight, None if bias is None else bias.float())
    num_rows, num_columns = weight.shape
    stored = Checkpoint.open(int8, torch.float32, CPU).linear(linear, num_rows, num_columns, bias is not None)
    expected = ((stored(x) - y).norm(dim=-1) / y.norm(dim=-1)).mean().item()
    found = {row.name: row.error for row in errors(source, int8, scheme, WINDOWS[:1])}
    # Codes are rounded after a norm that sums in another order: a few of 192 may differ by one.
    assert found[linear] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("part", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_a_corrupted_linear_comes_first(smoothed: tuple[Path, Path], tmp_path: Path, part: str) -> None:
    source, int8 = smoothed
    name = f"model.layers.1.{part}"
    state = load_file(int8 / "model.safetensors")
    codes = state[f"{name}.weight"]
    # Every fourth row negated: the others of the layer stay as they are.
    state[f"{name}.weight"] = torch.where(torch.arange(len(codes))[:, None] % 4 == 0, -codes, codes)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in int8.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    first, *rest = errors(source, damaged, SMOOTHED)
    assert first.name == name
    assert first.error > 0.5
    whole = {row.name: row.error for row in errors(source, int8, SMOOTHED)}
    others = {row.name: row.error for row in rest}
    # Negated rows have no ratio to undo, so what reads them is off too, but nothing else is.
    unread = {other for other in others if not other.startswith("model.layers.1.")}
    assert all(others[other] == whole[other] for other in unread)


def test_a_linear_that_is_missing_is_told(smoothed: tuple[Path, Path], tmp_path: Path) -> None:
    source, int8 = smoothed
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in int8.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(damaged, {name: None})
    with pytest.raises(CheckpointError, match="has no tensor " + name):
        errors(source, damaged, SMOOTHED)
