"""Logging as text or JSON, with the id of the request that a line belongs to, and the access log."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

from service.settings import Settings
from service.telemetry.record import RequestRecord, current

TEXT_FORMAT = "%(asctime)s %(levelname)s {process} %(name)s: %(message)s"
QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics"})
"""Polled every few seconds by machines, so they are logged at debug level unless the status is not 200."""

access = logging.getLogger("ottava.access")


def configure_logging(settings: Settings, stream: TextIO = sys.stderr, process: str = "web") -> None:
    """Send all loggers, including the HTTP server's, to one stream in the format of the settings.

    The two processes of a server write to the same stream, one line at a time; each line names its process.
    """
    handler = logging.StreamHandler(stream)
    handler.addFilter(_add_request_id)
    if settings.log_format == "json":
        fields = {"asctime": "time", "levelname": "level", "name": "logger"}
        formatter: logging.Formatter = JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            rename_fields=fields,
            static_fields={"process": process},
        )
    else:
        formatter = logging.Formatter(TEXT_FORMAT.format(process=process))
    handler.setFormatter(formatter)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def log_request(record: RequestRecord) -> None:
    """Write the access line of a finished request. It contains prompts and answers only if the record has them."""
    fields = access_fields(record)
    is_quiet = record.route in QUIET_ROUTES and record.status == 200
    line = " ".join(f"{name}={_shown(value)}" for name, value in fields.items() if name not in _IN_FRONT)
    message = f"{record.method} {record.route} {record.status or 'gone'} {line}"
    access.log(logging.DEBUG if is_quiet else logging.INFO, "%s", message, extra=fields)


def access_fields(record: RequestRecord) -> dict[str, object]:
    """The fields of the access line: for a generation, the tokens of all its runs, and variant and times of the first.

    status is None if the client disconnected before an answer began. Times are in milliseconds.
    """
    fields: dict[str, object] = {
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "duration_ms": round((record.ended_s - record.received_s) * 1e3, 3),
        "key": record.key,
        "request_id": record.id,
    }
    if record.runs:
        first = record.runs[0]
        times = first.metrics.model_dump(include={"queue_ms", "ttft_ms", "tpot_ms", "e2e_ms"}, exclude_none=True)
        fields |= {
            "variant": first.variant,
            "outcome": first.outcome,
            "num_runs": len(record.runs),
            "prompt_tokens": sum(run.metrics.prompt_tokens for run in record.runs),
            "generated_tokens": sum(run.metrics.generated_tokens for run in record.runs),
            **{name: round(value, 3) for name, value in times.items()},
        }
        if first.prompt is not None:
            fields |= {"prompt": first.prompt, "output": [run.output for run in record.runs]}
    return fields


_WORD = re.compile(r"[\w./:+-]+", re.ASCII)
_IN_FRONT = frozenset({"method", "route", "status"})


def _shown(value: object) -> str:
    """A value as one word, so that text from a client cannot look like another field or line."""
    return str(value) if isinstance(value, (int, float)) or _WORD.fullmatch(str(value)) else json.dumps(value)


def _add_request_id(line: logging.LogRecord) -> bool:
    """Add the current request's id to a line. Lines of engine threads and of start-up have none."""
    record = current.get()
    if record is not None and not hasattr(line, "request_id"):
        line.request_id = record.id
    return True
