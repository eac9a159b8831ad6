"""Rotated weights are the same function, and no channel of the residual stream stands out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.safetensors_files import TensorFiles
from quant.convert.rotate import RotatedFiles, rotation
from quant.errors import CheckpointError
from quant.linear import FloatLinear
from quant.part import WHOLE, Part
from quant.scheme import PRESETS
from service.errors import UnsupportedModel
from service.models.config import ModelConfig, stream_of
from service.models.decoder import Decoder, score
from service.models.families import FAMILIES
from service.models.loader import load_decoder
from service.store.calibration import Calibration
from service.store.quantized import quantize_model
from tests.service.kinds import Tiny
from tests.support.tiny_models import TINY, change_tensors, save_tiny_model

CPU = torch.device("cpu")
IDS = torch.randint(3, 256, (90,), generator=torch.Generator().manual_seed(8))
ROTATED = [name for name in TINY if name.split("-")[0] not in {"gemma2", "gemma3_text", "opt", "gpt2", "gpt_neox"}]
PLAIN = Calibration(num_windows=2, window_len=32)


def error(found: Tensor, expected: Tensor) -> float:
    relative: float = ((found - expected).norm() / expected.norm()).item()
    return relative


@pytest.mark.parametrize("width", [1, 2, 64, 12, 192, 576, 9])
def test_a_rotation_is_orthogonal_and_mixes_every_channel(width: int) -> None:
    turn = rotation(width).double()
    assert (turn @ turn.T - torch.eye(width)).abs().max() < 1e-6
    assert torch.equal(rotation(width), rotation(width))
    power = width & -width
    assert turn.abs().max() < 1.001 / power**0.5


class Files:
    """A float decoder's weights from files that were opened as is."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files

    def tensor(self, name: str, shape: tuple[int, ...], part: Part = WHOLE) -> Tensor:
        assert self.files.shape(name) == shape
        return self.files.get(name).float()

    def linear(self, name: str, out: int, width: int, has_bias: bool, **_: object) -> object:
        bias = self.tensor(f"{name}.bias", (out,)) if has_bias else None
        return FloatLinear(self.tensor(f"{name}.weight", (out, width)), bias)

    def differs(self, name: str, other: str) -> bool:
        return name in self.files and not torch.equal(self.files.get(name), self.files.get(other))


@pytest.mark.parametrize("name", ROTATED)
def test_the_function_of_every_family_stays(tiny: Tiny, name: str) -> None:
    """With tied and own heads, fused and biased Linears, experts; and every tensor that should change does."""
    _, folder = tiny(name)
    config = ModelConfig.load(folder)
    files, plain = RotatedFiles(folder, stream_of(config)), TensorFiles(folder)
    decoder = Decoder(config, Files(files))  # type: ignore[arg-type]
    with torch.inference_mode():
        assert error(score(decoder, IDS), score(load_decoder(folder, torch.float32, CPU), IDS)) < 2e-5
    same = {key for key in plain.names if torch.equal(files.get(key).float(), plain.get(key).float())}
    assert all(
        key.endswith(("q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias", "_norm.weight")) for key in same
    ), same
    assert not any(key.endswith(("input_layernorm.weight", "model.norm.weight")) for key in same)


@pytest.mark.parametrize("name", [name for name in TINY if name not in ROTATED])
def test_other_norms_are_refused_by_name(tiny: Tiny, name: str) -> None:
    _, folder = tiny(name)
    with pytest.raises(UnsupportedModel, match="through which no rotation passes: leave rotate off"):
        stream_of(ModelConfig.load(folder))


def test_every_family_is_rotated_or_refused() -> None:
    assert {name.split("-")[0] for name in TINY} == set(FAMILIES)


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with three channels of the stream sixty times as large as the others."""
    folder = save_tiny_model(tmp_path_factory.mktemp("outliers") / "model", "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, [3, 70, 150]] *= 60.0
    return change_tensors(folder, tensors)


@pytest.mark.parametrize("scheme", ["rtn-token", "rtn-dynamic"])
def test_no_channel_stands_out_after_it(outlying: Path, tmp_path: Path, scheme: str) -> None:
    """Also as transformers reads the folder, which has an own head then."""
    made = PRESETS[scheme]
    for name, each in (("plain", made), ("rotated", made.with_rotation(True))):
        quantize_model(outlying, tmp_path / name, each, PLAIN, CPU)
    opened = Checkpoint.open(tmp_path / "rotated", torch.float32, CPU)
    assert (opened.schemes[0].is_rotated, opened.schemes[0].label) == (True, f"{scheme}, rotated")
    assert opened.config["tie_word_embeddings"] is False
    with torch.inference_mode():
        expected = score(load_decoder(outlying, torch.float32, CPU), IDS)
        plain, rotated = (
            error(score(load_decoder(tmp_path / name, torch.float32, CPU), IDS), expected)
            for name in ("plain", "rotated")
        )
        assert rotated < 0.5 * plain, (rotated, plain)
        if scheme == "rtn-token":
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated", dtype=torch.float32)
            assert error(model(IDS[None]).logits[0], expected) < 1.2 * rotated


def test_it_goes_with_smoothing_and_a_sink(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "qwen2")
    scheme = PRESETS["w8a8"].with_alpha(0.5).with_rotation(True).with_sink([1])
    quantize_model(folder, tmp_path / "int8", scheme, PLAIN, CPU)
    text = torch.cat((torch.tensor([1]), IDS))
    with torch.inference_mode():
        expected = score(load_decoder(folder, torch.float32, CPU), text)
        found = score(load_decoder(tmp_path / "int8", torch.float32, CPU), text)
    assert error(found[:1], expected[:1]) < 0.01, "up to the head's rounding to bfloat16"
    assert error(found, expected) < 0.15


def test_a_scheme_without_a_stream_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "gpt2")
    with pytest.raises((UnsupportedModel, CheckpointError), match="gpt2 has LayerNorms"):
        quantize_model(folder, tmp_path / "int8", PRESETS["rtn-token"].with_rotation(True), PLAIN, CPU)
