"""What a format of tool calls is made of, and what its readers share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple, NoReturn


class Call(NamedTuple):
    """A complete call. arguments: a JSON object."""

    name: str
    arguments: str


class Head(Enum):
    """What the JSON is that follows a marker, in which a call may be written."""

    CALL = auto()
    """An object with the name and the arguments."""
    CALLS = auto()
    """A list of such objects."""
    ARGUMENTS = auto()
    """The arguments alone; the name stands before them."""


@dataclass(frozen=True, slots=True)
class Frame:
    """How calls are written where they are forced:

    start (before_name NAME after_name ARGUMENTS end) separator (...) finish.

    separator: None if an answer holds one call at most.
    """

    before_name: str
    after_name: str
    end: str
    start: str = ""
    separator: str | None = None
    finish: str = ""


@dataclass(frozen=True, slots=True)
class Format:
    """How a family of models writes calls.

    opening, closing: the markers around a call; closing may be empty.
    markers: all texts that may be special tokens, which an answer shows only on demand.
    is_bare: a call may also come without its opening, at the start of the answer or behind another call.
    head: reads the text between the opening and the first brace: what follows, and the name where it stands there;
        None if it is no call.
    makes_id: makes the id of a call.
    adapts_id: makes an id that the chat template takes of one that a client sent.
    """

    name: str
    opening: str
    closing: str
    markers: tuple[str, ...]
    frame: Frame
    head: Callable[[str], tuple[Head, str] | None]
    makes_id: Callable[[], str]
    adapts_id: Callable[[str], str]
    is_bare: bool = False


def plain_head(text: str) -> tuple[Head, str] | None:
    """The head of formats whose marker is followed by an object at once."""
    return None if text.strip() else (Head.CALL, "")


def calls_of(raw: str, head: Head, name: str, known: Set[str] | None) -> Sequence[Call] | None:
    """The calls in the JSON behind a head; None if it is no call.

    known: the names that a call may have; None for any.
    """
    try:
        value = json.loads(raw, parse_constant=_refuse)
        values = value if head is Head.CALLS else [value]
        calls = [Call(name, _object(each)) if head is Head.ARGUMENTS else _call(each) for each in values]
    except (ValueError, RecursionError):
        return None
    return calls if calls and all(known is None or call.name in known for call in calls) else None


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call")  # noqa: TRY004 (what is read is no call, whatever its type)
    value["name"].encode()
    return Call(value["name"], _object(value.get("arguments", value.get("parameters"))))


def _object(value: Any) -> str:
    # Some models write the arguments as a text that holds the JSON.
    value = json.loads(value, parse_constant=_refuse) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError("no object")  # noqa: TRY004
    text = json.dumps(value, ensure_ascii=False)
    # Half a surrogate pair cannot be sent.
    text.encode()
    return text


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no JSON")
