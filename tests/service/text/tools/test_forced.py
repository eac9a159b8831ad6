"""Forced calls: the grammar holds arguments to the schema, and its parser passes them on as they come."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from service.errors import InvalidRequest
from service.text.grammars.compiler import RulesCompiler
from service.text.json.schema import json_rules
from service.text.tools.calls import Arguments, Called, Tool
from service.text.tools.forced import MAX_CALLS, ForcedParser, call_grammar
from service.text.tools.format import Format
from service.text.tools.hermes import HERMES
from service.text.tools.llama import LLAMA
from service.text.tools.mistral import MISTRAL, MISTRAL_ARGS
from service.text.tools.parser import FreeParser
from tests.support.grammars import EOS, JSON, TOKENS

FORMATS = [HERMES, LLAMA, MISTRAL, MISTRAL_ARGS]
TOOLS = [
    Tool(
        "weather.now",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 2},
            },
            "required": ["city", "unit"],
            "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 31}},
            "additionalProperties": False,
        },
    ),
    Tool("stop"),
    Tool("any", {"type": "object"}),
]


NONE: Mapping[int, str] = {}


def random_text(rules: str, seed: int, compiler: RulesCompiler = JSON, names: Mapping[int, str] = NONE) -> str:
    """A text that the grammar allows, chosen at random with a liking for its end."""
    matcher, rng = compiler.compile(rules).matcher(), random.Random(seed)
    out: list[int] = []
    while True:
        bits = np.unpackbits(np.frombuffer(matcher.allowed(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        ends = [i for i in allowed if i in (EOS, ord('"'), ord("}"), ord("]"))]
        token = rng.choice(ends if ends and rng.random() < 0.4 else allowed)
        if token == EOS:
            return b"".join(names[i].encode() if i in names else TOKENS[i] for i in out).decode()
        matcher.accept(token)
        out.append(token)


def calls_in(format_: Format, text: str, size: int) -> list[tuple[str, str]]:
    parser = ForcedParser(format_.frame)
    names: list[str] = []
    arguments: list[str] = []
    for start in range(0, len(text), size):
        for event in parser.push(text[start : start + size]):
            if isinstance(event, Called):
                assert event.index == len(names)
                names.append(event.name)
                arguments.append("")
            else:
                assert isinstance(event, Arguments)
                assert event.index == len(names) - 1
                arguments[event.index] += event.text
    assert parser.flush() == []
    return list(zip(names, arguments, strict=True))


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_every_text_of_the_grammar_is_calls_that_fit(format_: Format, is_parallel: bool) -> None:
    rules = call_grammar(TOOLS, format_, {}, is_parallel=is_parallel).text()
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    most = 1
    for seed in range(30):
        text = random_text(rules, seed)
        calls = calls_in(format_, text, 1 + seed % 5)
        most = max(most, len(calls))
        for name, arguments in calls:
            Draft202012Validator(schemas[name] or {"maxProperties": 0}).validate(json.loads(arguments))
        assert 1 <= len(calls) <= (MAX_CALLS if is_parallel else 1)
        assert all(arguments.startswith("{") and arguments.endswith("}") for _, arguments in calls)
        free = FreeParser(format_, schemas.keys())
        found = [*free.push(text), *free.flush()]
        assert [event.name for event in found if isinstance(event, Called)] == [name for name, _ in calls]
        assert len(found) == 2 * len(calls)
    assert (most > 1) == (is_parallel and format_.frame.separator is not None)


def test_a_marker_that_is_a_special_token_is_written_as_that_token() -> None:
    special = {"[TOOL_CALLS]": 0, "[ARGS]": 1, "[INST]": 5}
    rules = call_grammar([Tool("f")], MISTRAL_ARGS, special, is_parallel=False).text()
    matcher = JSON.compile(rules).matcher()
    for token in (0, ord("f"), 1, ord("{"), ord("}"), EOS):
        matcher.accept(token)
    named = random_text(rules, 0, names={0: "[TOOL_CALLS]", 1: "[ARGS]"})
    assert calls_in(MISTRAL_ARGS, named, 3) == [("f", "{}")]


def test_a_text_or_a_call() -> None:
    rules = json_rules({"const": [7]}) | call_grammar([Tool("f")], HERMES, {}, is_parallel=False)
    texts = {random_text(rules.text(), seed) for seed in range(20)}
    assert {"[7]", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'} == texts


def test_arguments_that_are_cut_off_are_passed_on_so_far() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "b'
    assert calls_in(HERMES, text, 4) == [("f", '{"a": "b')]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}}, ["tool 'f'", "`pattern`"]),
        ({"type": "array"}, ["tool 'f'", "an object"]),
        ({"anyOf": [{"type": "object"}, {"type": "null"}]}, ["tool 'f'", "an object"]),
        ({"type": "object", "description": "x" * 70000}, ["tool 'f'", "bytes"]),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_by_its_tool(parameters: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call_grammar([Tool("f", parameters)], HERMES, {}, is_parallel=False)
    assert caught.value.param == "tools"
    assert [word for word in words if word not in caught.value.message] == []


def test_many_schemas_are_bounded_together() -> None:
    tools = [Tool(f"f{n}", {"type": "object", "description": "x" * 30000}) for n in range(3)]
    with pytest.raises(InvalidRequest, match="name the one to call") as caught:
        call_grammar(tools, HERMES, {}, is_parallel=False)
    assert caught.value.param == "tools"


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of the kind that tools have: nested objects and lists, bounds, choices, references."""
    kinds = ["string", "integer", "number", "boolean", "enum", "const", "any"] + ["object", "array", "anyOf"] * depth
    match rng.choice(kinds):
        case "string":
            return rng.choice([{"type": "string"}, {"type": "string", "format": "date"}])
        case "integer" | "number" as name:
            low = rng.randint(-99, 99)
            return {"type": name, "minimum": low, "maximum": low + rng.randint(0, 50)}
        case "enum":
            return {"enum": rng.sample(["a", 'quo"te', "é", None, 7, {"b": []}], rng.randint(1, 3))}
        case "const":
            return {"const": rng.choice(["x\n", 1.5, [1, "2"]])}
        case "object":
            return random_object(rng, depth - 1)
        case "array":
            most = rng.randint(0, 3)
            return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": most}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1), {"type": "null"}]}
    return {"type": "boolean"}


def random_object(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    names = rng.sample(["city", "unit", "x y", 'a"b', "größe"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_random_schemas_are_kept(format_: Format) -> None:
    """50 in each format: 200 together."""
    for seed in range(50):
        schema = random_object(random.Random(f"{format_.name}{seed}"))
        rules = call_grammar([Tool("f", schema)], format_, {}, is_parallel=False).text()
        ((name, arguments),) = calls_in(format_, random_text(rules, seed), 1 + seed % 9)
        assert name == "f"
        Draft202012Validator(schema).validate(json.loads(arguments))
