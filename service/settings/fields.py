"""Metadata of the settings' fields: panel in help, choices, types, and whether a field is a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, SecretStr
from pydantic.fields import FieldInfo

HIDDEN = "(hidden)"
ANY = "*"
Fields = Mapping[str, FieldInfo]


def _origin(value: str) -> str:
    if value != ANY and not re.fullmatch(r"https?://[^/\s]+", value):
        raise ValueError(f"{value!r} is no origin; write scheme and host as https://example.org, or *")
    return value


def _host_name(value: str) -> str:
    if value != ANY and not re.fullmatch(r"[^\s/:\[\]*]+|\[[0-9A-Fa-f:.]+\]", value):
        raise ValueError(f"{value!r} is no host name; write it without scheme and port as example.org or [::1], or *")
    return value.lower()


Origin = Annotated[str, AfterValidator(_origin)]
"""Scheme and host of a page, or * for all."""
HostName = Annotated[str, AfterValidator(_host_name)]
"""A host name as in a Host header, in lower case and without a port, or * for any."""


@dataclass(frozen=True, slots=True)
class Panel:
    """The title of a group of fields in help: the annotated field and those after it, up to the next title."""

    title: str


@dataclass(frozen=True, slots=True)
class Choices:
    """Values to list in help and to complete in a shell, for a field that is not a Literal."""

    words: tuple[str, ...]


def panels(fields: Fields) -> dict[str, str]:
    """The panel of every field by name: its own title, or that of the field before it."""
    title, found = "", {}
    for name, field in fields.items():
        title = next((mark.title for mark in field.metadata if isinstance(mark, Panel)), title)
        found[name] = title
    return found


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The values that a field, or an entry of its list, may have; empty if any."""
    literals = [
        str(word) for leaf in leaves(field.annotation) if get_origin(leaf) is Literal for word in get_args(leaf)
    ]
    marked = [word for mark in field.metadata if isinstance(mark, Choices) for word in mark.words]
    return (*literals, *marked)


def leaves(annotation: Any) -> list[Any]:
    """The types inside an annotation's lists and unions; a Literal is one type, None is left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return leaves(get_args(annotation)[0])
    if origin in (Union, UnionType, tuple, list):
        return [leaf for part in get_args(annotation) for leaf in leaves(part)]
    return [] if annotation in (NoneType, Ellipsis) else [annotation]


def is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in (tuple, list)


def is_secret(field: FieldInfo) -> bool:
    return SecretStr in leaves(field.annotation)


def shown(value: object, field: FieldInfo) -> str:
    """The repr of a value for messages; a placeholder if it is a secret."""
    return HIDDEN if is_secret(field) else repr(value)
