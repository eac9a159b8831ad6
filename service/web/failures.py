"""Error responses: one JSON shape, with a message that names the value, the limit and the remedy."""

from __future__ import annotations

import json
import logging
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence, Set
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.errors import ClientGone, InvalidRequest, Malformed, OttavaError, RequestError
from service.telemetry.metrics import NO_FIELD, NO_VARIANT, REJECTED, UNKNOWN_FIELD, WHOLE_BODY
from service.web.reading import Handler, direct_handler
from service.web.schemas.failure import ErrorDetail, ErrorResponse, MessagesErrorResponse
from service.web.state import serving_of

log = logging.getLogger(__name__)

# pydantic's error types for values out of range (400); every other type is an error of the body's shape (422).
_VALUE_ERRORS = {
    "finite_number": "which is not a finite number; send one",
    "greater_than": "which is not above the limit of {gt}; send more than {gt}",
    "greater_than_equal": "which is below the limit of {ge}; send at least {ge}",
    "less_than": "which is not below the limit of {lt}; send less than {lt}",
    "less_than_equal": "which is above the limit of {le}; send at most {le}",
    "too_long": "which has too many entries; the limit is {max_length}",
    "too_short": "which has too few entries; the smallest number is {min_length}",
    "string_too_long": "which is too long; the limit is {max_length} characters",
    "string_too_short": "which is too short; send at least {min_length} character",
    "literal_error": "which is not one of {expected}; send one of these",
    "string_unicode": "which holds half a surrogate pair; send valid Unicode",
    "not_honoured": "which this server does not honour; {message}",
    "not_text": "which is not text; {message}",
    "not_schema": "which is no JSON of an object; {message}",
    "not_arguments": "which is no JSON of an object; {message}",
    "too_deep": "which is nested too deep; {message}",
    "tools_alone": "which has `tools` without `messages`; {message}",
    "not_one": "but {message}",
    "no_choice": "which is no choice of a tool; {message}",
    "unknown_kind": "which is not of a type that is served here; {message}",
    "no_content": "which has no `content`; {message}",
    "string_pattern_mismatch": "which does not match {pattern}; send a name that does",
}
REFUSALS = (400, 404, 422)
"""Statuses that blame a field of the request."""
MESSAGES = "/v1/messages"
"""Answers below this path are in Anthropic's format, their errors too."""
_ANTHROPIC_STATUSES = {
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
}
CLIENT_GONE_STATUS = 499
_MAX_SHOWN = 80
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _MAX_SHOWN
_SHORT.maxlevel = 2
_LONG_NUMBER = re.compile(rf"\d{{{_MAX_SHOWN + 1},}}")


class CountedRoute(APIRoute):
    """A route that tells the field of what it refuses, and counts requests with an unreadable body as rejected.

    What takes `body` and `http` alone, and depends on nothing else, gets its body from `service.web.reading`.
    """

    def get_route_handler(self) -> Handler:  # type: ignore[override]
        direct = None if self.dependencies or self._embed_body_fields else direct_handler(self.endpoint)
        handler = direct or super().get_route_handler()
        body = None if self.body_field is None else self.body_field.field_info.annotation
        fields: frozenset[str] = getattr(body, "names", frozenset())

        async def counted(request: HTTPRequest) -> Response:
            try:
                return await handler(request)
            except (RequestValidationError, HTTPException) as error:
                serving_of(request).metrics.count(NO_VARIANT, REJECTED)
                param = describe(error.errors()).param if isinstance(error, RequestValidationError) else None
                request.state.refused_field = known_field(param, fields)
                raise
            except RequestError as error:
                if error.status in REFUSALS:
                    request.state.refused_field = known_field(error.param, fields)
                raise

        return counted


def known_field(param: str | None, fields: Set[str]) -> str:
    """A field's label in metrics, one of few: the field if the body has such a one."""
    if param is None:
        return WHOLE_BODY
    return param if param in fields else UNKNOWN_FIELD


def add_handlers(app: FastAPI) -> None:
    """Install the handlers that answer exceptions with an `ErrorResponse`."""
    app.add_exception_handler(OttavaError, _on_ottava_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGone, _on_client_gone)


def error_body(error: OttavaError) -> ErrorResponse:
    """The body for an OttavaError. Numbers of more than 80 digits in its message are shortened."""
    message = _LONG_NUMBER.sub(_cut_digits, error.message)
    return ErrorResponse(error=ErrorDetail(message=message, type=error.type, param=error.param, code=error.code))


def internal_error() -> ErrorResponse:
    """The body for an unexpected exception, which reveals no internals."""
    message = "internal error; the server's log has it under this answer's x-request-id"
    return error_body(OttavaError(message))


def messages_error(body: ErrorResponse, status: int = HTTPStatus.OK) -> MessagesErrorResponse:
    """The same error in Anthropic's format. status: of its response; OK inside a stream."""
    own = "api_error" if body.error.type == OttavaError.type else body.error.type
    kind = _ANTHROPIC_STATUSES.get(HTTPStatus(status), own)
    return MessagesErrorResponse(type="error", error=body.error.model_copy(update={"type": kind}))


def answer(status: int, body: ErrorResponse, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response with this body, in the format of the request's path."""
    told = messages_error(body, status) if path.startswith(MESSAGES) else body
    # ASCII only, because a message may quote a field name that is not valid Unicode.
    return Response(json.dumps(told.model_dump()), status, headers, "application/json")


def refusal(error: OttavaError, path: str) -> Response:
    """The response for an OttavaError to a request for this path."""
    return answer(error.status, error_body(error), path, error.headers)


def describe(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """The one error to report of all that pydantic found: the first error of shape, else the first of value."""
    first = next((error for error in errors if error["type"] not in _VALUE_ERRORS), errors[0])
    kind = first["type"]
    path = [part for part in first["loc"] if part != "body"]
    # For invalid JSON, the path is a character position rather than a field.
    name = path[0] if path and kind != "json_invalid" else first.get("ctx", {}).get("name")
    param = None if name is None else str(name)
    if kind in _VALUE_ERRORS:
        reason = _VALUE_ERRORS[kind].format(**first.get("ctx", {}), message=first["msg"])
        return InvalidRequest(f"`{_dotted(path) or 'body'}` is {_shown(first['input'])}, {reason}", param)
    # OpenAI answers 400 to an unknown parameter.
    refusal = InvalidRequest if kind == "unknown_parameter" else Malformed
    return refusal(_shape_message(kind, path, first), param)


def _shape_message(kind: str, path: list[Any], error: Mapping[str, Any]) -> str:
    if kind == "json_invalid":
        return f"the body is not valid JSON, at character {path[0]}: {error['ctx']['error']}"
    if kind == "prompt_source":
        return f"{error['msg']}; send one of them"
    if kind in ("unknown_field", "unknown_parameter"):
        name, nearest = error["ctx"]["name"], error["ctx"]["nearest"]
        hint = f"did you mean `{nearest[0]}`?" if nearest else "leave it out"
        return f"`{_dotted([*path, name])}` is not a field of this request; {hint}"
    if not path:
        return "the body must be a JSON object, sent with the header content-type: application/json"
    if kind == "missing":
        return f"`{_dotted(path)}` is missing; send it"
    given = error["input"]
    return f"`{_dotted(path)}` is {_shown(given)} of type {type(given).__name__}: {error['msg'].lower()}; see /docs"


def _unreadable(cause: BaseException | None) -> BaseException | None:
    """The cause of an HTTPException; an InvalidRequest if Python's JSON reader could not read the body."""
    if isinstance(cause, RecursionError):
        return InvalidRequest(
            "the lists and objects of the body lie too deep inside each other to be read; send fewer levels"
        )
    if isinstance(cause, UnicodeDecodeError):
        return InvalidRequest(f"the body is not valid {cause.encoding}, at byte {cause.start}; send JSON in UTF-8")
    if isinstance(cause, ValueError):
        limit = sys.get_int_max_str_digits()
        return InvalidRequest(
            f"the body holds a number of more than {limit} digits, which is the limit; send a smaller one"
        )
    return cause


def _cut_digits(number: re.Match[str]) -> str:
    half = _MAX_SHOWN // 2
    return f"{number[0][:half]}...{number[0][-half:]}"


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(str(part) for part in path)


def _shown(value: object) -> str:
    return _SHORT.repr(value)


def _count(request: HTTPRequest, error: OttavaError) -> None:
    """Count a refusal, by the field that its route has found at fault."""
    serving_of(request).metrics.refused_for(error, getattr(request.state, "refused_field", NO_FIELD))


async def _on_ottava_error(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, OttavaError)
    if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("request %s failed: %s", request.state.request_id, error.message, exc_info=error)
    _count(request, error)
    return refusal(error, request.url.path)


async def _on_invalid_body(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = describe(error.errors())
    _count(request, found)
    return answer(found.status, error_body(found), request.url.path)


async def _on_client_gone(_request: HTTPRequest, _error: Exception) -> Response:
    """What a client is answered that has left, for the log."""
    return Response(status_code=CLIENT_GONE_STATUS)


async def _on_http_error(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = _unreadable(error.__cause__)
    if isinstance(cause, OttavaError):
        _count(request, cause)
        return refusal(cause, request.url.path)
    status = HTTPStatus(error.status_code)
    message = str(error.detail)
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        message = f"{request.method} {request.url.path[:_MAX_SHOWN]}: {status.phrase.lower()}; /docs lists the routes"
    code = status.phrase.lower().replace(" ", "_")
    detail = ErrorDetail(message=message, type=RequestError.type, param=None, code=code)
    return answer(status, ErrorResponse(error=detail), request.url.path, error.headers)
