"""OpenAPI descriptions that FastAPI cannot infer: error responses, and the events of streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.web.schemas.failure import ErrorResponse

Responses = dict[int | str, dict[str, Any]]

REFERENCE = "#/components/schemas/{model}"
EVERY_ROUTE = (413, 421, 500)
"""Statuses that the middleware may answer on any route."""

_MEANINGS = {
    400: "A value outside its range: the message names field, value, limit and remedy.",
    401: "No API key, or an unknown one; only if keys are set.",
    403: "An admin route of a server that has no admin keys.",
    404: "A model or variant that is not served here.",
    409: "The reload failed and changed nothing, or another one is running.",
    413: "A body above the limit.",
    421: "A Host header that names another server.",
    422: "A body of the wrong shape: unknown field, wrong type, missing field, not JSON.",
    429: "Too many requests of this API key; see Retry-After.",
    500: "The engine, or the server, failed.",
    503: "Not ready, stopping, too many requests queued, or queued too long; see Retry-After.",
    504: "Not done within the request's timeout.",
}


def failures(*statuses: int, model: type[BaseModel] = ErrorResponse) -> Responses:
    """The error responses of a route: these statuses, plus those of every route. model: of their body."""
    wanted = sorted({*statuses, *EVERY_ROUTE})
    return {status: {"model": model, "description": _MEANINGS[status]} for status in wanted}


def generation(
    description: str, *events: type[BaseModel], is_named: bool = False, failure: type[BaseModel] = ErrorResponse
) -> Responses:
    """The responses of a generation route, which answers as a whole or as a stream of these events.

    is_named: whether each has a name, the type of its data, and no [DONE] comes after the last. failure: the body of
    error responses; what an event has that tells of a failure.
    """
    models = events if is_named else (*events, failure)
    encoded = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(model) for model in models]},
    }
    data = encoded if is_named else {"anyOf": [{"const": "[DONE]"}, encoded]}
    name = {"event": {"type": "string"}} if is_named else {}
    # Describes one event, because OpenAPI 3.1 cannot describe the items of a stream.
    event = {"type": "object", "properties": {**name, "data": data}, "required": [*name, "data"]}
    ok = {"description": description, "content": {"text/event-stream": {"schema": event}}}
    return {200: ok, **failures(400, 401, 404, 422, 429, 503, 504, model=failure)}


def amend(app: FastAPI, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply a change to the app's OpenAPI document when it is built.

    That is at the first call of `app.openapi`, and takes about 130 ms.
    """
    build = app.openapi

    def openapi() -> dict[str, Any]:
        is_new = app.openapi_schema is None
        document = build()
        if is_new:
            change(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def document_events(app: FastAPI, *events: type[BaseModel]) -> None:
    """Add the models of events to the components of the app's OpenAPI, since no route returns them directly."""

    def add(document: dict[str, Any]) -> None:
        _, found = models_json_schema([(model, "serialization") for model in events], ref_template=REFERENCE)
        for name, schema in found["$defs"].items():
            document["components"]["schemas"].setdefault(name, schema)

    amend(app, add)


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}
