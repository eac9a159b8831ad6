"""Reads a JSON schema's keywords, and refuses unsupported ones with location, limit and remedy."""

from __future__ import annotations

import json
from typing import Any, NoReturn
from urllib.parse import unquote

from service.errors import InvalidRequest

PARAM = "response_format"
MAX_SHOWN = 60
MAX_DIGITS = 9
"""Most digits of a list index in a reference: a larger one exceeds any list in a schema, and int() may refuse it."""
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
KEYWORDS: dict[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format"},
    "integer": BOUNDS,
    "number": BOUNDS,
    "boolean": set(),
    "null": set(),
}
"""The types, and the keywords of each."""

ANNOTATIONS = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples",
    "readOnly", "title", "writeOnly",
}  # fmt: skip

Place = tuple[str, ...]
"""The location of a part in a schema: the keys that lead to it."""


def refuse(at: Place, complaint: str) -> NoReturn:
    """Raise InvalidRequest about the part at a location."""
    shown = "/".join(["#", *at])
    raise InvalidRequest(f"the JSON schema at {shown[:MAX_SHOWN]} {complaint}", PARAM)


def shown(value: object) -> str:
    """The JSON of a value, cut to a length that fits in a message."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def json_text(value: object, at: Place) -> str:
    """The JSON of a value. Refuses NaN, infinity, half a surrogate pair, and nesting beyond the recursion limit."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        refuse(at, f"is no JSON that can be served ({error}): mend or flatten it")
    return text


def resolve(root: dict[str, Any], pointer: object, at: Place) -> tuple[Place, Any]:
    """The location that a reference names, and the part there. Refuses a reference to nothing."""
    if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
        refuse(at, f"is {shown(pointer)}: refer to a part of the same schema, as in '#/$defs/name'")
    part: Any = root
    place = tuple(unquote(key).replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:])
    for key in place:
        if isinstance(part, list) and _is_place(key) and int(key) < len(part):
            part = part[int(key)]
        elif isinstance(part, dict) and key in part:
            part = part[key]
        else:
            refuse(at, f"is {shown(pointer)}, which is not there: add it")
    return place, part


def _is_place(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) <= MAX_DIGITS


def types_of(schema: dict[str, Any], at: Place) -> list[str]:
    """The types that a schema names, or that its keywords imply."""
    if "type" not in schema:
        words = schema.keys() - ANNOTATIONS
        implied = [name for name, own in KEYWORDS.items() if own & words and words <= own]
        return implied[:1] or refuse(at, f"has no `type` beside {', '.join(sorted(words))}: add it")
    named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not named or any(not isinstance(name, str) or name not in KEYWORDS for name in named):
        refuse((*at, "type"), f"is {shown(schema['type'])}: use {', '.join(KEYWORDS)}, or a list of these")
    return list(dict.fromkeys(named))


def is_of(value: object, types: list[str]) -> bool:
    """Whether a JSON value has one of the types."""
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int | float):
        return "number" in types or ("integer" in types and (isinstance(value, int) or value.is_integer()))
    kinds: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null") in types


def range_of(schema: dict[str, Any], what: str, at: Place) -> tuple[int, int | None]:
    """The values of `min` and `max` followed by what (Length or Items): (least, most), most None if unlimited."""
    least, most = _count(schema, f"min{what}", at), _count(schema, f"max{what}", at)
    if most is not None and (least or 0) > most:
        refuse(at, f"has min{what} {least} above max{what} {most}: swap them")
    return least or 0, most


def _count(schema: dict[str, Any], word: str, at: Place) -> int | None:
    count = schema.get(word)
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        refuse((*at, word), f"is {shown(count)}: use a whole number from 0")
    return count
