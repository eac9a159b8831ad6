"""Reads the JSON body of a request as FastAPI does, for routes that take nothing else: `direct_handler`.

FastAPI looks for parameters in the path, the query, the headers and the cookies too, and opens a scope for what they
depend on: 170 calls for each request.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from email.message import Message
from functools import lru_cache
from typing import Any, get_type_hints

from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

Handler = Callable[[HTTPRequest], Awaitable[Response]]


def direct_handler(endpoint: Callable[..., Any]) -> Handler | None:
    """What answers a request by calling the endpoint; None unless it takes `body` and `http` and returns a response.

    The handler raises, beside what the endpoint raises:
        RequestValidationError: the body is not JSON or not of the endpoint's model; as FastAPI raises it.
        HTTPException: 400, the body cannot be read; its cause says why.
    """
    hints = get_type_hints(endpoint)
    if list(inspect.signature(endpoint).parameters) != ["body", "http"] or hints.get("return") is not Response:
        return None
    model: type[BaseModel] = hints["body"]

    async def handle(request: HTTPRequest) -> Response:
        value = await _json_of(request)
        try:
            body = model.model_validate(value, from_attributes=True)
        except ValidationError as error:
            raise RequestValidationError(_errors_of(error), body=value) from error
        response: Response = await endpoint(body=body, http=request)
        return response

    return handle


async def _json_of(request: HTTPRequest) -> Any:
    """The value of a JSON body; of one that is not said to be JSON its bytes. Raises as a handler does."""
    try:
        data = await request.body()
        if data:
            return json.loads(data) if _is_json(request.headers.get("content-type", "")) else data
    except json.JSONDecodeError as error:
        details = {"loc": ("body", error.pos), "msg": "JSON decode error", "input": {}, "ctx": {"error": error.msg}}
        raise RequestValidationError([{"type": "json_invalid", **details}], body=error.doc) from error
    except HTTPException:
        raise
    except Exception as error:
        raise HTTPException(400, "the body could not be read") from error
    raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}])


@lru_cache(maxsize=64)
def _is_json(content_type: str) -> bool:
    """Whether a content type is application/json or of its kind."""
    header = Message()
    header["content-type"] = content_type
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _errors_of(error: ValidationError) -> list[Any]:
    """pydantic's errors, at the places where FastAPI says that they are."""
    return [{**found, "loc": ("body", *found["loc"])} for found in error.errors(include_url=False)]
