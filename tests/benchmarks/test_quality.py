"""The quality table's parts: schemes by name, questions from worked examples, rows that are kept."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality, wheels
from benchmarks.mmlu import parse_subject
from quant.analysis.choices import Question
from quant.errors import InvalidScheme
from quant.scheme import PRESETS
from tests.support.tiny_models import save_tiny_model

SUBJECT = """The following are multiple choice questions (with answers) about sums.

Q: One and one?
(A) 1 (B) 2 (C) a (B)-tree (D) 4
A: Let's think step by step. 1 + 1 = 2. The answer is (B).

Q: Which hold?
I. 1 = 1.
(A) I only
(B) none
A: Let's think step by step.

I holds. The answer is (A).

Q: Four and four?
(A) 7 (B) 6 (C) 5 (D) 4 (E) 8
A: Let's think step by step. The answer is (E)."""


def test_questions_are_taken_from_worked_examples() -> None:
    assert parse_subject(SUBJECT) == [
        Question("One and one?\nAnswer:", ("1", "2", "a (B)-tree", "4"), 1),
        Question("Which hold?\nI. 1 = 1.\nAnswer:", ("I only", "none"), 0),
        Question("Four and four?\nAnswer:", ("7", "6", "5", "4", "8"), 4),
    ]


def test_schemes_by_name(tmp_path: Path) -> None:
    assert quality.parse("w8a8", Path()) == PRESETS["w8a8"]
    assert quality.parse(" w8a8:0.5", Path()) == PRESETS["w8a8"].with_alpha(0.5)
    assert quality.parse("rtn-token+gptq", Path()) == PRESETS["rtn-token"].with_rounding("gptq")
    folder = save_tiny_model(tmp_path / "model")
    assert quality.parse("w8a8-static+gptq+sink", folder).label == "w8a8-static, gptq, sink"
    with pytest.raises(InvalidScheme, match="gptqq"):
        quality.parse("w8a8+gptqq", Path())
    with pytest.raises(InvalidScheme, match="choose one of"):
        quality.parse("w4a16", Path())
    with pytest.raises(InvalidScheme, match="does not smooth"):
        quality.parse("rtn:0.5", Path())


def test_every_method_is_in_the_table() -> None:
    assert set(PRESETS) < {spec.partition(":")[0] for spec in quality.SCHEMES} | {"w8a8:0.5"}
    labels = [quality.parse(spec, Path()).label for spec in quality.SCHEMES]
    assert len(set(labels)) == len(labels)


RUN = {"date": "1", "command": "a", "device": "d", "windows": [20, 512]}


@pytest.mark.parametrize(
    ("run", "is_kept"), [(RUN | {"date": "2", "command": "b"}, True), (RUN | {"windows": [2, 512]}, False)]
)
def test_rows_of_the_same_run_are_kept(tmp_path: Path, run: dict[str, Any], is_kept: bool) -> None:
    out = tmp_path / "q.json"
    assert quality.kept_rows(out, run) == []
    out.write_text(json.dumps({"run": RUN, "rows": [{"scheme": "fp16"}]}))
    assert quality.kept_rows(out, run) == ([{"scheme": "fp16"}] if is_kept else [])


def row(model: str, scheme: str, **changes: float) -> dict[str, Any]:
    measured = {"perplexity": 20.0, "perplexity_ratio": 1.25, "kl": 0.5, "top1_agreement": 0.75, "num_tokens": 9}
    cost = {"weight_bytes": 2_000_000, "kv_bytes_per_token": 8, "tokens_per_s": 3.0}
    return {"model": model, "scheme": scheme, **measured, **cost, **changes}


def test_the_table_has_both_models_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    quality.print_table([row("plain", "a", choice_accuracy=0.25, choice_agreement=0.5), row("outliers", "a", kl=0.125)])
    heading, rule, line = capsys.readouterr().out.splitlines()
    assert heading.count("|") == rule.count("|") == line.count("|")
    assert line == ("| `a` | 20.00 | +25.0% | 0.5000 | 75.0% | 25.0% | 50.0% | 2 | 3.0 | 20.00 | +25.0% | 0.1250 |")


def test_a_table_of_one_model_leaves_the_others_cells_empty(capsys: pytest.CaptureFixture[str]) -> None:
    quality.print_table([row("plain", "a")])
    assert capsys.readouterr().out.splitlines()[2].endswith("| 75.0% |  |  | 2 | 3.0 |  |  |  |")


@pytest.mark.parametrize("is_known", [True, False])
def test_a_wheels_file_is_taken_if_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool) -> None:
    def download(command: list[str], check: bool) -> None:
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/a.whl", "w") as archive:
            archive.writestr("b/c.txt", "text")

    monkeypatch.setattr(subprocess, "run", download)
    path = tmp_path / "text" / "c.txt"
    sha256 = hashlib.sha256(b"text" if is_known else b"other").hexdigest()
    if is_known:
        assert wheels.fetch_member(path, "a==1", "b/c.txt", sha256).read_text() == "text"
        monkeypatch.setattr(subprocess, "run", None)
        wheels.fetch_member(path, "a==1", "b/c.txt", sha256)
    else:
        with pytest.raises(SystemExit, match=r"b/c.txt of a==1 is not the file that is known here"):
            wheels.fetch_member(path, "a==1", "b/c.txt", sha256)
        assert not path.exists()
