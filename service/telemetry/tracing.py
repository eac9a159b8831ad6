"""Enables OpenTelemetry traces if the standard variables name an endpoint; otherwise does not import the library."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Protocol

from service.errors import InvalidSettings
from service.telemetry.record import RequestRecord

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SPOKEN = "http/protobuf"


class Tracer(Protocol):
    """Creates the spans of finished requests; implemented by `service.telemetry.spans.SpanTracer`."""

    def begin(self, record: RequestRecord) -> None:
        """Set the trace of a request that has arrived."""
        ...

    def trace(self, record: RequestRecord) -> None: ...

    def close(self) -> None:
        """Send all queued spans and stop."""
        ...


def is_traced(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment enables traces."""
    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not is_off and any(environment.get(name) for name in ENDPOINTS)


def open_tracer(model: Callable[[], str], environment: Mapping[str, str] = os.environ) -> Tracer | None:
    """A tracer that exports to the endpoint in the environment, or None without one.

    Args:
        model: returns the model's name; called when a generation has ended.

    Raises:
        InvalidSettings: as `check_tracing`.
    """
    spans = check_tracing(environment)
    if spans is None:
        return None
    tracer: Tracer = spans.exporting_tracer(model)
    return tracer


def check_tracing(environment: Mapping[str, str] = os.environ) -> ModuleType | None:
    """Import `service.telemetry.spans` if the environment enables traces, else return None. Sends nothing.

    Raises:
        InvalidSettings: traces are enabled, but the extra `otel` is not installed or the protocol is not http/protobuf.
    """
    if not is_traced(environment):
        return None
    for name in PROTOCOLS:
        if environment.get(name, SPOKEN) != SPOKEN:
            raise InvalidSettings(f"{name} is {environment[name]!r}; traces are sent only as {SPOKEN}: unset it")
    try:
        return import_module("service.telemetry.spans")
    except ModuleNotFoundError as error:
        raise InvalidSettings(
            f"traces are enabled by {' or '.join(ENDPOINTS)}, but {error.name} is not installed: "
            "pip install 'ottava[otel]', or unset the variable"
        ) from error
