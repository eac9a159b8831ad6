"""Files of a folder: whole, sharded, missing, cut short, pickled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from tests.quant.fixtures import DOWN, FIXTURES, SHAPE, copy_of
from tests.support.narrowed import int8_of


def open_(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, torch.float32, "cpu")


@pytest.fixture
def w8a8(tmp_path: Path) -> Path:
    return copy_of("dynamic", tmp_path)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no config\.json"):
        open_(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("[]", "a JSON list")])
def test_a_config_that_is_no_object(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=rf"pickled weights only \({name}\).*convert them to safetensors"):
        open_(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        open_(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999], ids=str)
def test_a_truncated_file_is_refused_when_opened(w8a8: Path, keep: float) -> None:
    path = w8a8 / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is not a whole safetensors file .*download it again"
    ):
        open_(w8a8)


def shard(folder: Path) -> dict[str, str]:
    """Split model.safetensors into two files with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_sharded_folder_reads_the_same(w8a8: Path) -> None:
    shard(w8a8)
    one, other = open_(w8a8), open_(FIXTURES / "dynamic")
    assert one.files.names == other.files.names
    linears = (int8_of(checkpoint.linear(DOWN, *SHAPE, False)) for checkpoint in (one, other))
    assert torch.equal(*(linear.weight_q for linear in linears))


def test_a_missing_shard(w8a8: Path) -> None:
    shard(w8a8)
    (w8a8 / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        open_(w8a8)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x.weight": "a.safetensors"}, r"a\.safetensors lacks the tensor x\.weight"),
        ({"x.weight": "../a.safetensors"}, "is not a file name of this folder"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit(w8a8: Path, weight_map: object, message: str) -> None:
    shard(w8a8)
    (w8a8 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_(w8a8)


def test_shards_without_an_index(w8a8: Path) -> None:
    shard(w8a8)
    (w8a8 / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds 2 safetensors files and no"):
        open_(w8a8)
