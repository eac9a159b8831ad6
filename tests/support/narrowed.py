"""Values of several types as the one type that a test expects; any other fails the test."""

from __future__ import annotations

from typing import TypeVar

from quant.linear import FloatLinear, Int8Linear

T = TypeVar("T")


def present(value: T | None) -> T:
    assert value is not None
    return value


def int8_of(linear: FloatLinear | Int8Linear) -> Int8Linear:
    assert isinstance(linear, Int8Linear)
    return linear


def float_of(linear: FloatLinear | Int8Linear) -> FloatLinear:
    assert isinstance(linear, FloatLinear)
    return linear
