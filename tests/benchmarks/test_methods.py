"""The benchmark of the methods runs whole on a CPU, and times nothing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import methods
from quant.linear import Int8Linear


def run(monkeypatch: pytest.MonkeyPatch, out: Path) -> list[dict[str, object]]:
    argv = ["methods.py", "--shape", "tiny", "--tokens", "1,3", "--commit", "test", "--out", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    try:
        methods.main()
    finally:
        rows: list[dict[str, object]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return rows


def test_every_method_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(monkeypatch, tmp_path / "methods.json")
    assert len(rows) == 4 * 2 * len(methods.METHODS)
    assert all("us_p50" in row for row in rows)
    assert all(("speedup" in row) == (row["variant"] != "fp16") for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["Linear", "tokens"]
    assert len(lines) == 2 + 4 * 2


@pytest.mark.parametrize("method", ["zeroquant", "llm-int8"])
def test_a_wrong_method_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    right = Int8Linear.__call__

    def wrong(self: Int8Linear, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = right(self, x, residual)
        is_chosen = self.input_codes.outliers is not None if method == "llm-int8" else self.weight_scale.ndim == 2
        return y * (1 + 2.0**-8) if is_chosen else y

    monkeypatch.setattr(Int8Linear, "__call__", wrong)
    with pytest.raises(SystemExit, match="wrong result"):
        run(monkeypatch, tmp_path / "methods.json")
    rows = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))["rows"]
    assert {row["variant"] for row in rows if "wrong" in row} == {method}
    assert not [row for row in rows if "wrong" in row and "us_p50" in row]


def test_outliers_are_where_the_method_looks_for_them() -> None:
    x = methods._activation(3, 256, 7, torch.device("cpu"))
    assert (x.abs() >= methods.THRESHOLD).any(0).sum() == 7
