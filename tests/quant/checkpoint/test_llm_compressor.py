"""Checkpoints that llm-compressor wrote: our decoder's logits beside transformers' on the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant.checkpoint.safetensors_files import TensorFiles
from quant.errors import CheckpointError
from quant.linear import Int8Linear
from quant.part import Ranges
from service.models.decoder import score
from service.models.loader import load_decoder
from tests.quant.fixtures import FIXTURES, NAMES, copy_of, edit
from tests.support.quant_oracle import limit_codes_to_127, load

IDS = torch.arange(48) * 7 % 64


def ours(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return score(load_decoder(folder, torch.float32, torch.device("cpu")), IDS)


def theirs(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: Tensor = load(folder)(IDS[None]).logits[0]
    return logits


@pytest.fixture
def range_of_127(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_codes_to_127(monkeypatch)


def test_every_recipe_is_here() -> None:
    assert NAMES == ["dynamic", "group", "sharded-mixed", "smoothquant-gptq", "static", "static-asymmetric"]
    assert sum(path.stat().st_size for path in FIXTURES.glob("*/*") if path.suffix != ".pyc") < 300_000


STATIC = ("static", "static-asymmetric")


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Logits, and the tokens that they choose where the two best are further apart than a tie moves them."""
    assert (found - expected).norm() / expected.norm() < 5e-3
    best = expected.topk(2).values
    is_clear = best[:, 0] - best[:, 1] > 0.05 * expected.std()
    assert is_clear.float().mean() > 0.8
    assert torch.equal(found.argmax(-1)[is_clear], expected.argmax(-1)[is_clear])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATIC])
def test_logits_are_the_oracle_s_where_ranges_agree(name: str, range_of_127: None) -> None:
    expected = theirs(FIXTURES / name)
    found = ours(FIXTURES / name)
    # A code on a tie may fall either way after a float sum in another order; nothing else differs.
    assert_close(found, expected)


@pytest.mark.parametrize("name", STATIC)
def test_static_logits_are_the_oracle_s_as_it_comes(name: str) -> None:
    """Both sides use all codes, -128..127, and no scale is found as it runs."""
    expected = theirs(FIXTURES / name)
    found = ours(FIXTURES / name)
    assert_close(found, expected)
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_stored_tensor_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, get = set[str](), TensorFiles.get

    def noted(files: TensorFiles, key: str, *part: Ranges | None) -> Tensor:
        read.add(key)
        return get(files, key, *part)

    monkeypatch.setattr(TensorFiles, "get", noted)
    ours(FIXTURES / name)
    stored = {key for path in (FIXTURES / name).glob("*.safetensors") for key in load_file(path)}
    assert read == stored


@pytest.mark.parametrize("name", NAMES)
def test_the_linears_are_int8(name: str) -> None:
    """Three products of each layer eat int8; layer 1's down_proj, which no target names, stays float in one folder."""
    decoder = load_decoder(FIXTURES / name, torch.float32, torch.device("cpu"))
    floats = [
        (index, linear.shape)
        for index, layer in enumerate(decoder.layers)
        for linear in layer.linears
        if not isinstance(linear, Int8Linear)
    ]
    assert floats == ([(1, (32, 64))] if name == "sharded-mixed" else [])


def test_parts_that_cannot_be_one_product_are_refused_by_name(tmp_path: Path) -> None:
    """q_proj float beside an int8 k_proj and v_proj: they are one product here, as in other servers."""
    q = "model.layers.0.self_attn.q_proj"

    def make_float(state: dict[str, Tensor]) -> None:
        state[f"{q}.weight"] = state[f"{q}.weight"] * state.pop(f"{q}.weight_scale")

    folder = edit(copy_of("dynamic", tmp_path), make_float, lambda quantization: quantization["ignore"].append(q))
    with pytest.raises(CheckpointError, match=r"dynamic: cannot fuse 1 float with 2 int8 Linears"):
        ours(folder)
