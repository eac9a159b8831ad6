"""Calls in free answers: what is read, what stays text, and that the way an answer is split changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.text.tools.calls import Arguments, Called, Event, Said
from service.text.tools.format import Format
from service.text.tools.hermes import HERMES
from service.text.tools.llama import LLAMA
from service.text.tools.mistral import MISTRAL, MISTRAL_ARGS
from service.text.tools.parser import MAX_FAILURES, FreeParser

FORMATS = [HERMES, LLAMA, MISTRAL, MISTRAL_ARGS]
NAMES = {"f", "weather.now"}
Read = tuple[str, list[tuple[str, Any]]]


def events(format_: Format, pieces: Sequence[str], most: int | None = None) -> list[Event]:
    parser = FreeParser(format_, NAMES, most)
    return [event for piece in pieces for event in parser.push(piece)] + parser.flush()


def read(format_: Format, *pieces: str, most: int | None = None) -> Read:
    """The content, and name and arguments of each call."""
    text, arguments = "", [""] * 100
    names: list[str] = []
    for event in events(format_, pieces, most):
        match event:
            case Said(said):
                text += said
            case Called(index, name):
                assert index == len(names)
                names.append(name)
            case Arguments(index, piece):
                assert index == len(names) - 1
                arguments[index] += piece
    return text, [(name, json.loads(arguments[place])) for place, name in enumerate(names)]


F = '{"name": "f", "arguments": {"a": 1}}'
P = F.replace("arguments", "parameters")
TRAP = {"a": '</tool_call> "}] [TOOL_CALLS] \\', "b": ["{", {"c": "}"}]}


@pytest.mark.parametrize(
    ("format_", "text", "content", "calls"),
    [
        (HERMES, f"<tool_call>\n{F}\n</tool_call>", "", [("f", {"a": 1})]),
        (HERMES, f"<tool_call>{F}</tool_call>", "", [("f", {"a": 1})]),
        (HERMES, f"Let me see.\n<tool_call>\n{F}\n</tool_call>", "Let me see.", [("f", {"a": 1})]),
        (HERMES, f"<tool_call>{F}</tool_call>\n<tool_call>{F}</tool_call>\n", "", [("f", {"a": 1})] * 2),
        (HERMES, f"a\n<tool_call>{F}</tool_call>\nb ", "a\n\nb ", [("f", {"a": 1})]),
        (HERMES, f"<tool_call>{F}</tool_call>\nb", "b", [("f", {"a": 1})]),
        (HERMES, f"<tool_call>{F}", "", [("f", {"a": 1})]),
        (HERMES, f"<tool_call>{F}\n</tool_c", "", [("f", {"a": 1})]),
        (HERMES, '<tool_call>{"name": "new", "arguments": {}}</tool_call>', "", [("new", {})]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
        (HERMES, f"<tool_call>{json.dumps({'name': 'f', 'arguments': TRAP})}</tool_call>", "", [("f", TRAP)]),
        (LLAMA, P, "", [("f", {"a": 1})]),
        (LLAMA, f"\n {P}", "", [("f", {"a": 1})]),
        (LLAMA, f"<|python_tag|>{P}", "", [("f", {"a": 1})]),
        (LLAMA, f"Well: <|python_tag|>{P}", "Well:", [("f", {"a": 1})]),
        (LLAMA, f"{P}; {P}", "", [("f", {"a": 1})] * 2),
        (LLAMA, f"{P}\nDone.", "Done.", [("f", {"a": 1})]),
        (MISTRAL, f"[TOOL_CALLS] [{F}, {F}]", "", [("f", {"a": 1})] * 2),
        (MISTRAL, f"[TOOL_CALLS]{F}", "", [("f", {"a": 1})]),
        (MISTRAL, '[TOOL_CALLS]weather.now[ARGS]{"a": 1}', "", [("weather.now", {"a": 1})]),
        (MISTRAL_ARGS, 'So[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f{}', "So", [("f", {"a": 1}), ("f", {})]),
        (MISTRAL_ARGS, "[TOOL_CALLS]f[CALL_ID]aB3[ARGS]{}", "", [("f", {})]),
    ],
)
def test_calls(format_: Format, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    assert read(format_, text) == (content, calls)
    assert read(format_, *text) == (content, calls)


MALFORMED = [
    (HERMES, "<tool_call>"),
    (HERMES, "<tool_call>{"),
    (HERMES, "<tool_call>[1]</tool_call>"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>'),
    (HERMES, f"<tool_call>{F} and more</tool_call>"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "cut'),
    (HERMES, "<tool_call> is the tag for calls, see {here}"),
    (HERMES, "a < b, <tool"),
    (HERMES, " \n two  spaces \n\n"),
    (LLAMA, '{"name": "Bob", "parameters": {"age": 7}}'),
    (LLAMA, '{"name": "f", "age": 7}'),
    (LLAMA, f"The call is {P}"),
    (LLAMA, "{"),
    (LLAMA, "[1, 2]"),
    (MISTRAL, "[TOOL_CALLS][]"),
    (MISTRAL, f"[TOOL_CALLS][{F}, 5]"),
    (MISTRAL, "[TOOL_CALLS] use tools, {please}"),
    (MISTRAL_ARGS, "[TOOL_CALLS]" + "f" * 300 + "[ARGS]{}"),
]


@pytest.mark.parametrize(("format_", "text"), MALFORMED)
def test_what_is_no_call_stays_text_to_the_letter(format_: Format, text: str) -> None:
    assert read(format_, text) == (text, [])
    assert read(format_, *text) == (text, [])


def test_a_call_behind_a_malformed_one_is_found() -> None:
    broken = '<tool_call>{"name": </tool_call>'
    assert read(HERMES, f"{broken}<tool_call>{F}</tool_call>") == (broken, [("f", {"a": 1})])


def test_a_limit_drops_the_calls_beyond_it_and_keeps_the_text() -> None:
    text = f"a<tool_call>{F}</tool_call><tool_call>{F}</tool_call>b"
    assert read(HERMES, text, most=1) == ("ab", [("f", {"a": 1})])
    assert read(MISTRAL, f"[TOOL_CALLS][{F}, {F}, {F}]", most=2) == ("", [("f", {"a": 1})] * 2)


def test_openings_without_end_are_read_a_bounded_number_of_times() -> None:
    text = "<tool_call>{" * (4 * MAX_FAILURES)
    assert read(HERMES, text) == (text, [])
    assert read(HERMES, text + f"<tool_call>{F}</tool_call>")[1] == []


def test_text_is_passed_on_as_it_comes() -> None:
    parser = FreeParser(HERMES, NAMES)
    assert parser.push("Hello") == [Said("Hello")]
    assert parser.push(" <b>") == [Said(" <b>")]
    assert parser.push(" <tool") == []
    assert parser.push("box>") == [Said(" <toolbox>")]


FRAGMENTS = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        *'{}[]":;\\ \n',
        "text",
        "f",
        '{"name": "f", "arguments": {"a": "}"}}',
        '{"name": "f", "parameters": {}}',
        "\u2028é",
    ]
)


@settings(max_examples=300)
@given(st.sampled_from(FORMATS), st.lists(FRAGMENTS, max_size=12), st.data())
def test_the_split_of_an_answer_changes_nothing(format_: Format, fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(format_, *pieces) == read(format_, text) == read(format_, *text)


@settings(max_examples=300)
@given(st.sampled_from(FORMATS), st.lists(FRAGMENTS, max_size=12))
def test_an_answer_without_calls_is_its_text(format_: Format, fragments: list[str]) -> None:
    text = "".join(fragments)
    content, calls = read(format_, text)
    assert calls or content == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{}", max_size=3), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text("xyz", min_size=1, max_size=3), VALUES, max_size=3)


@settings(max_examples=200)
@given(st.sampled_from(FORMATS), st.lists(OBJECTS, min_size=1, max_size=3), st.integers(1, 7))
def test_what_is_written_in_a_format_is_read_again(format_: Format, arguments: list[dict[str, Any]], size: int) -> None:
    frame = format_.frame
    arguments = arguments if frame.separator is not None else arguments[:1]
    calls = [frame.before_name + "f" + frame.after_name + json.dumps(each) + frame.end for each in arguments]
    text = frame.start + (frame.separator or "").join(calls) + frame.finish
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert read(format_, *pieces) == ("", [("f", each) for each in arguments])
