"""Flags derived from the settings: a field is defined once, and is a flag of every command that uses it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.markup import escape

from quant.errors import InvalidScheme
from quant.scheme import Rounding, Scheme
from service.errors import InvalidSettings
from service.settings import Settings
from service.settings.fields import choices_of, is_list, is_secret, leaves, panels

FIELDS = Settings.model_fields
FLAGS = tuple(name for name, field in FIELDS.items() if not is_secret(field))
"""Secrets have no flag, because every user of a machine can read its processes' flags; use a variable or the file."""

PANELS = panels(FIELDS)
SECRETS = tuple(name for name, field in FIELDS.items() if is_secret(field))


def complete(words: Iterable[str]) -> Callable[[str], list[str]]:
    """A completion function for one of the words."""
    known = list(words)
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]


def complete_list(words: Iterable[str]) -> Callable[[str], list[str]]:
    """A completion function for words separated by commas, each used once."""
    known = list(words)

    def completed(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        taken = before.split(",")
        return [before + comma + word for word in known if word.startswith(last) and word not in taken]

    return completed


Model = Annotated[str | None, typer.Argument(help=FIELDS["model"].description, metavar="MODEL")]
RoundingOfWeights = Annotated[
    str | None,
    typer.Option(
        "--rounding",
        help="Rounding of weights: nearest or gptq.",
        show_default="the scheme's",
        autocompletion=complete(["nearest", "gptq"]),
    ),
]


def takes_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the flags of these settings to a command, which gets them in its `**settings`; None if left out."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = [name for name in names if name not in signature.parameters]
        switches = [name for name in taken if _kind(FIELDS[name]) is bool]

        @wraps(command)
        def with_settings(**given: Any) -> None:
            for name in switches:
                given[name] = _switched(name, on=given[name], off=given.pop(f"no_{name}"))
            command(**given)

        flags = [flag for name in taken for flag in _parameters(name)]
        with_settings.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        return with_settings

    return decorate


def scheme_of(name: str, alpha: float | None, rounding: str | None) -> Scheme:
    """A preset; alpha replaces its own if it smooths, and rounding if it is int8.

    Raises:
        InvalidSettings: there is no such preset, or it does not support these options.
    """
    try:
        return Scheme.preset(name.strip()).with_alpha(alpha).with_rounding(cast("Rounding | None", rounding))
    except InvalidScheme as error:
        raise InvalidSettings(str(error)) from error


def _parameters(name: str) -> Iterator[inspect.Parameter]:
    """The flag of a setting. A switch has two, on and off, and help shows the one that changes the default."""
    field, flag = FIELDS[name], name.replace("_", "-")
    if _kind(field) is bool:
        yield _parameter(name, f"--{flag}", bool, hidden=field.default is True)
        yield _parameter(f"no_{name}", f"--no-{flag}", bool, hidden=field.default is False)
        return
    words = choices_of(field)
    finish = complete_list if is_list(field) else complete
    yield _parameter(name, f"--{flag}", _kind(field), autocompletion=finish(words) if words else None)


def _parameter(name: str, flag: str, kind: type, **option: Any) -> inspect.Parameter:
    setting = name if name in FIELDS else name.removeprefix("no_")
    described = typer.Option(
        flag, help=_help(FIELDS[setting]), rich_help_panel=PANELS[setting], show_default=False, **option
    )
    annotation = Annotated[kind | None, described]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _switched(name: str, on: bool | None, off: bool | None) -> bool | None:
    if on and off:
        flag = name.replace("_", "-")
        raise typer.BadParameter(f"--{flag} and --no-{flag} contradict each other; leave one out")
    return False if off else on


def _help(field: FieldInfo) -> str:
    words = choices_of(field)
    among = f" One of {', '.join(words)}." if words and not is_list(field) else ""
    return escape(f"{field.description}{among} [default: {_default(field)}]")


def _kind(field: FieldInfo) -> type:
    """The type that the command line checks: numbers, paths and switches. The settings check all else, and limits."""
    kinds = set(leaves(field.annotation)) & {int, float, bool, Path}
    return kinds.pop() if len(kinds) == 1 and not is_list(field) else str


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
