"""What a model's generation_config.json recommends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import UnsupportedModel
from service.host.generation_config import sampling_defaults


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "do_sample": True, "max_new_tokens": 9}, {}),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05},
        ),
        ({"temperature": 1, "top_k": 50.0}, {"temperature": 1, "top_k": 50}),
        ({"temperature": None, "top_p": None}, {}),
    ],
)
def test_what_is_recommended(content: dict[str, Any], found: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert sampling_defaults(tmp_path) == found


def test_without_the_file_nothing_is(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}


@pytest.mark.parametrize("bad", [{"temperature": 7}, {"top_p": 0}, {"top_k": -1}, {"min_p": "x"}, {"top_k": 1.5}])
def test_what_no_request_may_have_is_left_out_with_a_warning(
    bad: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1, **bad}))
    assert sampling_defaults(tmp_path) == {"repetition_penalty": 1.1}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{next(iter(bad))} is" in caplog.text


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        sampling_defaults(tmp_path)
