"""Forced calls of random schemas on a real server; `python -m benchmarks.tool_schemas` makes 200."""

from __future__ import annotations

import json
import random

import pytest
from jsonschema import Draft202012Validator

from benchmarks.tool_schemas import main, random_object, streamed_calls


def test_calls_over_the_real_channel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["tool_schemas", "--tiny", "--schemas", "8", "--commit", "none"])
    assert main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"] == 8


def test_deltas_of_a_stream_are_joined() -> None:
    stream = (
        'data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{"}}]}, '
    )
    stream += '"finish_reason": null}]}\n\ndata: {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": '
    stream += '{"arguments": "}"}}]}, "finish_reason": "tool_calls"}]}\n\ndata: [DONE]\n\n'
    assert streamed_calls(stream) == ("tool_calls", [("f", "{}")])


def test_schemas_are_valid_and_differ() -> None:
    made = [random_object(random.Random(number)) for number in range(200)]
    for schema in made:
        Draft202012Validator.check_schema(schema)
    assert len({json.dumps(schema) for schema in made}) > 190
