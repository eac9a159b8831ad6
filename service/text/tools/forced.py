"""Calls that the model must make: the grammar that holds an answer to them, and the parser of such an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from service.errors import InvalidRequest
from service.text.json.keywords import ANNOTATIONS
from service.text.json.schema import MAX_SCHEMA_BYTES, GrammarRules, Rules
from service.text.tools.calls import Arguments, Called, Event, Tool
from service.text.tools.format import Format, Frame
from service.text.tools.json_end import JsonEnd

PARAM = "tools"
MAX_CALLS = 16
"""Most calls in one answer that is forced to call."""

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def call_grammar(
    tools: Sequence[Tool], format_: Format, special_ids: Mapping[str, int], *, is_parallel: bool
) -> GrammarRules:
    """The rules for texts that call at least one of the tools.

    Args:
        special_ids: the special tokens by name; a marker among them is written as that token, not spelled.
        is_parallel: whether there may be several calls, if the format has them.

    Raises:
        InvalidRequest: the parameters of a tool hold something that the grammar does not serve, see `json_grammar`.
    """
    frame = format_.frame
    spell = _speller(format_, special_ids)
    rules: dict[str, str] = {}
    total = 0
    for place, tool in enumerate(tools):
        bodies, root = _arguments(tool, f"t{place}_")
        rules |= bodies
        total += len(json.dumps(tool.parameters))
        if total > MAX_SCHEMA_BYTES:
            raise InvalidRequest(
                f"the parameters of `tools` have more than {MAX_SCHEMA_BYTES} bytes, which is the limit where a call "
                "is forced; send fewer tools, or name the one to call",
                PARAM,
            )
        before, after = spell(f"{frame.before_name}{tool.name}{frame.after_name}"), spell(frame.end)
        rules[f"call{place}"] = f"{before} {root} {after}"
    rules["call"] = " | ".join(f"call{place}" for place in range(len(tools)))
    more = ""
    if is_parallel and frame.separator is not None:
        more = f"({spell(frame.separator)} call){{0,{MAX_CALLS - 1}}}"
    rules["calls"] = f"{spell(frame.start)} call {more} {spell(frame.finish)}"
    return GrammarRules(rules, "calls")


def _arguments(tool: Tool, prefix: str) -> GrammarRules:
    schema = NO_ARGUMENTS if tool.parameters is None else tool.parameters
    if not schema.keys() - ANNOTATIONS:
        schema = {**schema, "type": "object"}
    if schema.get("type", "object") != "object" or not {"type", "properties"} & schema.keys():
        raise InvalidRequest(
            f"the parameters of tool {tool.name!r} are not those of an object; send a schema of the type object", PARAM
        )
    try:
        return Rules(schema, prefix).all()
    except InvalidRequest as error:
        raise InvalidRequest(f"the parameters of tool {tool.name!r}: {error.message}", PARAM) from error


def _speller(format_: Format, special_ids: Mapping[str, int]) -> Callable[[str], str]:
    """Makes the terms of a grammar for a text: quoted, but for its markers that are special tokens."""
    tokens = {marker: special_ids[marker] for marker in format_.markers if marker in special_ids}

    def spell(text: str) -> str:
        found = min(((at, marker) for marker in tokens if (at := text.find(marker)) >= 0), default=None)
        if found is None:
            return json.dumps(text)
        at, marker = found
        return f"{json.dumps(text[:at])} Token({tokens[marker]}) {spell(text[at + len(marker) :])}"

    return spell


class ForcedParser:
    """Reads an answer that a grammar of `call_grammar` holds, and passes arguments on as they come.

    Implements `ToolParser`.
    """

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._head = ""
        self._end: JsonEnd | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[Event]:
        """See `ToolParser`."""
        events: list[Event] = []
        while text:
            text = self._read_head(text, events) if self._end is None else self._read_arguments(self._end, text, events)
        return events

    def flush(self) -> list[Event]:
        """See `ToolParser`. Nothing is held back but what belongs to no call."""
        return []

    def _read_head(self, text: str, events: list[Event]) -> str:
        """Look for the next call's name; returns the text behind it."""
        self._head += text
        _, begins, named = self._head.partition(self._frame.before_name)
        name, is_named, rest = named.partition(self._frame.after_name)
        if not begins or not is_named:
            return ""
        events.append(Called(self._num_calls, name))
        self._head, self._end = "", JsonEnd()
        return rest

    def _read_arguments(self, scan: JsonEnd, text: str, events: list[Event]) -> str:
        """Pass on the arguments in the text; returns the text behind them."""
        end = scan.push(text)
        events.append(Arguments(self._num_calls, text[:end]))
        if end is None:
            return ""
        self._end = None
        self._num_calls += 1
        return text[end:]
