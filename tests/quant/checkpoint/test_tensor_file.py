"""Safetensors files read by descriptor: as the library reads them, and never half of a file that changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.checkpoint.tensor_file import DTYPES, TensorFile
from quant.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = {name: torch.arange(6).reshape(2, 3).to(torch.float32).to(dtype) for name, dtype in DTYPES.items()}
    made |= {"none": torch.empty(0, 4), "one": torch.tensor(2.5), "large": torch.randn(300, 1000)}
    save_file(made, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_every_dtype_is_read_as_the_library_reads_it(path: Path) -> None:
    file = TensorFile(path)
    expected = load_file(path)
    assert file.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.view(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    file.refuse_changed()


def test_what_was_read_does_not_change_with_the_file(path: Path) -> None:
    found = TensorFile(path).read("large").clone()
    kept = TensorFile(path).read("large")
    path.write_bytes(bytes(path.stat().st_size))
    assert kept.equal(found)


@pytest.mark.parametrize("how", ["cut", "grown", "rewritten"])
def test_a_file_that_changes_after_it_was_opened_is_refused(path: Path, how: str) -> None:
    """Under a memory map the first kills the process, and the last is served half old, half new."""
    file = TensorFile(path)
    first = file.read("one")
    size = path.stat().st_size
    if how == "cut":
        os.truncate(path, size // 2)
    elif how == "grown":
        os.truncate(path, size + 1)
    else:
        os.utime(path, ns=(0, 0))
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    for name in ("large", "one"):
        with pytest.raises(CheckpointError, match=r"has changed while it was read|is not a whole safetensors file"):
            file.read(name)
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        file.refuse_changed()
    assert first.item() == 2.5


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


PLACE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        (1 << 60).to_bytes(8, "little"),
        (5).to_bytes(8, "little") + b"{",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        header(a=PLACE) + bytes(7),
        header(a=PLACE) + bytes(9),
        header(a={**PLACE, "dtype": "F31"}) + bytes(8),
        header(a={**PLACE, "shape": [3]}) + bytes(8),
        header(a={**PLACE, "shape": [-2]}) + bytes(8),
        header(a={**PLACE, "shape": 2}) + bytes(8),
        header(a={**PLACE, "data_offsets": [8, 0]}) + bytes(8),
        header(a={**PLACE, "data_offsets": [0]}) + bytes(8),
        header(a={"dtype": "F32"}) + bytes(8),
        header(a=PLACE, b=PLACE) + bytes(8),
        header(a=PLACE, b={**PLACE, "data_offsets": [9, 17]}) + bytes(17),
    ],
)
def test_what_is_no_whole_file_is_refused_when_it_is_opened(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        TensorFile(path)
