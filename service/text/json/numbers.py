"""Grammar rules for numbers between bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

MAX_INTEGER = 10**18 - 1
MAX_WHOLE = 10**9 - 1
"""Largest bound of numbers with a fraction: 9 digits before the point and 6 after it are exact as a double."""

FRACTION = '("." [0-9]{1,6})?'
SOME_FRACTION = '"." [0-9]{0,5} [1-9]'


def integer_rule(bounds: Mapping[str, Any]) -> str:
    """The rule of integers that minimum, maximum, exclusiveMinimum and exclusiveMaximum allow, at most 18 digits.

    Raises:
        ValueError: a bound is not a number or has more than 18 digits, or no integer is left.
    """
    values = _checked(bounds, MAX_INTEGER)
    low = max(
        math.ceil(values.get("minimum", -MAX_INTEGER)), math.floor(values.get("exclusiveMinimum", -MAX_INTEGER - 1)) + 1
    )
    high = min(
        math.floor(values.get("maximum", MAX_INTEGER)), math.ceil(values.get("exclusiveMaximum", MAX_INTEGER + 1)) - 1
    )
    if low > high:
        raise ValueError(f"leaves no integer between {low} and {high}: widen its bounds")
    ways = []
    if low < 0:
        ways.append(f'"-" ({whole(max(1, -high), -low)})')
    if high >= 0:
        ways.append(whole(max(0, low), high))
    return " | ".join(ways)


def number_rule(bounds: Mapping[str, Any]) -> str:
    """The rule of numbers that the bounds allow, with at most 9 digits before and 6 after the point.

    Raises:
        ValueError: a bound is not a whole number or has more than 9 digits, or no number is left.
    """
    values = _checked(bounds, MAX_WHOLE)
    for word, value in values.items():
        if value != int(value):
            raise ValueError(f"has {word} {value}: bounds of a number are served where they are whole; round it")
    low, below = _tighter(values, "minimum", "exclusiveMinimum", -MAX_WHOLE, max)
    high, above = _tighter(values, "maximum", "exclusiveMaximum", MAX_WHOLE, min)
    if low > high or (low == high and (below or above)):
        raise ValueError(f"leaves no number between {low} and {high}: widen its bounds")
    ways = []
    if low < 0:
        ways.append(f'"-" ({_magnitudes(max(0, -high), -low, above or high >= 0, below)})')
    if high > 0 or (high == 0 and not above):
        ways.append(_magnitudes(max(0, low), high, below and low >= 0, above))
    return " | ".join(ways)


def whole(low: int, high: int) -> str:
    """The rule of the integers low .. high, 0 <= low, without leading zeros."""
    ways = []
    for length in range(len(str(low)), len(str(high)) + 1):
        smallest = 0 if length == 1 else 10 ** (length - 1)
        ways.append(_between(str(max(low, smallest)), str(min(high, 10**length - 1))))
    return " | ".join(ways)


def _between(low: str, high: str) -> str:
    """The rule of the digit strings low .. high, of the same length, with leading zeros."""
    if not low:
        return '""'
    rest = len(low) - 1
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{rest + 1},{rest + 1}}}"
    if low[0] == high[0]:
        return f'"{low[0]}" ({_between(low[1:], high[1:])})'
    ways = [f'"{low[0]}" ({_between(low[1:], "9" * rest)})', f'"{high[0]}" ({_between("0" * rest, high[1:])})']
    if int(high[0]) - int(low[0]) > 1:
        ways.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}] [0-9]{{{rest},{rest}}}" if rest else _digit(low, high))
    return " | ".join(ways)


def _digit(low: str, high: str) -> str:
    return f"[{int(low) + 1}-{int(high) - 1}]"


def _magnitudes(low: int, high: int, is_above: bool, is_below: bool) -> str:
    """The rule of numbers from low to high, 0 <= low. is_above excludes low itself, is_below excludes high."""
    if low == high:
        return whole(low, low)
    ways = [f"({whole(low, low)}) {SOME_FRACTION if is_above else FRACTION}"]
    if high - low > 1:
        ways.append(f"({whole(low + 1, high - 1)}) {FRACTION}")
    if not is_below:
        ways.append(whole(high, high))
    return " | ".join(ways)


def _checked(bounds: Mapping[str, Any], limit: int) -> dict[str, float]:
    for word, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= limit:
            raise ValueError(f"has {word} {value!r}: use a number between {-limit} and {limit}")
    return dict(bounds)


def _tighter(
    values: Mapping[str, float], word: str, exclusive: str, default: int, choose: Callable[[list[int]], int]
) -> tuple[int, bool]:
    """The tighter of two bounds, and whether it is itself excluded."""
    bound = choose([int(values[name]) for name in (word, exclusive) if name in values] or [default])
    return bound, values.get(exclusive) == bound
