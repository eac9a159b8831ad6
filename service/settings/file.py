"""The TOML file of settings, and error messages for invalid names and values from any source."""

from __future__ import annotations

import logging
import os
import re
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

_LINK = re.compile(r"_PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?|_SERVICE_HOST|_SERVICE_PORT(_\w+)?")
"""What follows a service's name in the variables that Kubernetes sets for it in each pod of its namespace."""

logger = logging.getLogger(__name__)

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


class Environment(PydanticBaseSettingsSource):
    """Settings from environment variables, without those that Kubernetes sets for a service.

    Args:
        inner: pydantic-settings' own source.
    """

    def __init__(self, inner: PydanticBaseSettingsSource) -> None:
        super().__init__(inner.settings_cls)
        self._inner = inner

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._inner.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        """The values by setting."""
        links = {name.upper() for name in service_links()}
        return {name: value for name, value in self._inner().items() if variable_of(name) not in links}


def service_links() -> list[str]:
    """The variables that Kubernetes has set for services whose name begins with ottava.

    For a service NAME these are NAME_SERVICE_HOST, NAME_SERVICE_PORT, NAME_PORT, which is a URL, and more. A variable
    OTTAVA_PORT with a number is the setting.

    Source: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    ours = [name for name in os.environ if name.startswith(ENV_PREFIX)]
    services = [name.removesuffix("_SERVICE_HOST") for name in ours if name.endswith("_SERVICE_HOST")]
    return sorted({name for service in services for name in ours if _is_link(name, service)})


def _is_link(name: str, service: str) -> bool:
    if name == f"{service}_PORT":
        return "://" in os.environ[name]
    return name.startswith(service) and _LINK.fullmatch(name[len(service) :]) is not None


def tell_service_links() -> None:
    """Log one line about variables that are passed over as those of a Kubernetes service, if there are any."""
    links = service_links()
    if links:
        logger.warning(
            "%d variables such as %s are links to a Kubernetes service, not settings, and are passed over; "
            "enableServiceLinks: false in the pod keeps them away",
            len(links),
            links[0],
        )


def unknown_variable(fields: Fields) -> str | None:
    """An error message for an unknown variable with our prefix, which pydantic-settings would ignore; None if none."""
    known = [variable_of(name) for name in fields]
    passed = {*known, *CHAT_VARIABLES, *service_links()}
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in passed:
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
