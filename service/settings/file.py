"""The TOML file of settings, and error messages for invalid names and values from any source."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from service.errors import InvalidSettings
from service.settings.fields import Fields, is_list, leaves, shown

ENV_PREFIX = "OTTAVA_"
CHAT_VARIABLES = ("OTTAVA_URL", "OTTAVA_API_KEY")
"""Variables of `ottava chat`, which are not settings of the server."""

_TOML_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list"}


class SettingsFile(PydanticBaseSettingsSource):
    """Settings from the TOML file named by `config`; flags and variables override it."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """All keys and values; empty if no file is named. Raises InvalidSettings as `read_file`."""
        path = self.current_state.get("config")
        return read_file(Path(path), self.settings_cls.model_fields) if path else {}


def read_file(path: Path, fields: Fields) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        InvalidSettings: the file cannot be read, or contains an unknown key or a value of another type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSettings(f"the settings file {path} cannot be read: {error}") from error
    for name, value in values.items():
        if name not in fields:
            raise InvalidSettings(f"{path}: unknown key {name!r}; the nearest known one is {nearest(name, fields)!r}")
        if name == "config":
            raise InvalidSettings(
                f"{path}: key 'config' = {value!r} names another file; only one is read, merge the two"
            )
        allowed = _toml_types(fields[name])
        if type(value) not in allowed:
            wanted = " or ".join(text for kind, text in _TOML_NAMES.items() if kind in allowed)
            raise InvalidSettings(
                f"{path}: {name} = {shown(value, fields[name])} must be {wanted} ({fields[name].description})"
            )
    return values


def unknown_variable(fields: Fields) -> str | None:
    """An error message for an unknown variable with our prefix, which pydantic-settings would ignore; None if none."""
    known = [variable_of(name) for name in fields]
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in (*known, *CHAT_VARIABLES):
            return f"unknown environment variable {name}; the nearest known one is {nearest(name.upper(), known)}"
    return None


def complaint(name: str, value: object, message: str, fields: Fields, given: Mapping[str, object]) -> str:
    """An error message for a setting: value, error, where it was set, and description. given: values of flags."""
    if name not in fields:
        return f"unknown setting {name!r}; the nearest known one is {nearest(name, fields)!r}"
    field = fields[name]
    return f"{name} = {shown(value, field)}: {message}{_origin(name, given)} ({field.description})"


def variable_of(name: str) -> str:
    return f"{ENV_PREFIX}{name}".upper()


def nearest(name: str, known: Iterable[str]) -> str:
    return get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _toml_types(field: FieldInfo) -> set[type]:
    """The Python types of a field's TOML values; bool is not accepted as int, although it is one in Python."""
    numbers: dict[Any, set[type]] = {int: {int}, float: {int, float}, bool: {bool}}
    allowed = {kind for leaf in leaves(field.annotation) for kind in numbers.get(leaf, {str})}
    return allowed | {list} if is_list(field) else allowed


def _origin(name: str, given: Mapping[str, object]) -> str:
    if name in given:
        return ""
    variables = {variable.upper(): variable for variable in os.environ}
    if variable_of(name) in variables:
        return f", set by {variables[variable_of(name)]}"
    path = given.get("config") or os.environ.get(variables.get(variable_of("config"), ""))
    return f", set in {path}" if path else ""
