"""Sums of a folder's files: what they find, and that sha256sum reads them."""

import subprocess
from pathlib import Path

import pytest

from quant.checkpoint.sha256sums import SUMS_NAME, first_damaged, write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "sub" / "b c.bin").write_bytes(bytes(range(256)))
    (tmp_path / "empty").touch()
    write_sums(tmp_path)
    return tmp_path


def test_what_is_whole(folder: Path) -> None:
    assert first_damaged(folder) is None
    (folder / "later.txt").touch()
    assert first_damaged(folder) is None


def test_sha256sum_reads_them(folder: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_NAME], cwd=folder, check=True)


@pytest.mark.parametrize("name", ["a.json", "sub/b c.bin"])
def test_what_is_changed_cut_or_missing(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"x", bytes([content[0] ^ 1]) + content[1:]):
        path.write_bytes(damaged)
        assert first_damaged(folder) == name
    path.unlink()
    assert first_damaged(folder) == name
    path.mkdir()
    assert first_damaged(folder) == name


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"nonsense\n"])
def test_sums_that_cannot_be_read_vouch_for_nothing(folder: Path, content: bytes | None) -> None:
    if content is None:
        (folder / SUMS_NAME).unlink()
    else:
        (folder / SUMS_NAME).write_bytes(content)
    assert first_damaged(folder) is not None


def test_sums_that_were_cut_vouch_for_nothing(folder: Path) -> None:
    lines = (folder / SUMS_NAME).read_text().splitlines(keepends=True)
    (folder / SUMS_NAME).write_text("".join(lines[1:]))
    assert first_damaged(folder) == "a.json"
    (folder / SUMS_NAME).write_text("".join(lines)[:-3])
    assert first_damaged(folder) is not None
