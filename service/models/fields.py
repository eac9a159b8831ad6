"""Reads single values of a Hugging Face configuration, which may hold anything under any key."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from service.errors import UnsupportedModel

MOST = 2**31 - 1


def own_value(config: PreTrainedConfig, *keys: str) -> tuple[str, Any]:
    """The first of these keys that the configuration's class knows and that is set, with its value; else "", None.

    A key that only another family has changes nothing, as in transformers.
    """
    known = {each.name for each in fields(config)} | set(config.attribute_map)
    return next(
        ((key, value) for key in keys if key in known and (value := getattr(config, key, None)) is not None), ("", None)
    )


def count(config: PreTrainedConfig, *keys: str) -> int:
    """The first value of `own_value`. Raises UnsupportedModel if it is no whole number from 1, or there is none."""
    key, value = own_value(config, *keys)
    return checked_count(key or keys[0], value)


def checked_count(key: str, value: object) -> int:
    """A value. Raises UnsupportedModel if it is no whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise UnsupportedModel(f"{key} is {shown(value)}; a whole number from 1 to {MOST} is served")
    return value


def number(config: PreTrainedConfig, *keys: str) -> float | None:
    """The first value of `own_value`, or None. Raises UnsupportedModel if it is no positive finite number."""
    key, value = own_value(config, *keys)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UnsupportedModel(f"{key} is {shown(value)}; a positive finite number is served")
    return value


def shown(value: object) -> str:
    """A value of a file, cut to what a line can show."""
    return repr(value)[:100]
