"""schemathesis over the app's own OpenAPI: what the document promises holds for whatever it allows, and forbids."""

import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis import Case, CheckContext, Response
from schemathesis.config import HttpBearerAuthConfig
from schemathesis.python.asgi import get_client
from schemathesis.schemas import BaseSchema

from tests.support.fuzz import Streams, fuzz_app, strictly, thorough
from tests.support.narrowed import present

KEY = "a-key-for-the-tests"
ADMIN_KEY = "an-admin-key-for-the-tests"
Body = dict[str, Any]
URL = "http://localhost"
TEXT, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


def api_of(app: FastAPI) -> BaseSchema:
    """The app as schemathesis sees it; nothing of it runs yet."""
    api = schemathesis.openapi.from_dict(app.openapi())
    api.app = app
    api.config.generation.deterministic = True
    api.config.max_stream_events = 1 << 20
    # A request may ask for less time than it takes.
    api.config.checks.not_a_server_error.expected_statuses = ["2xx", "4xx", "504"]
    # 400: a value that does not go with another, or not with this server's model; no JSON schema can say so. 404: a
    # variant by another name than the served ones. 409: nothing can be reloaded here. A wrong shape would be 422.
    api.config.checks.positive_data_acceptance.expected_statuses = ["2xx", "400", "404", "409", "504"]
    return api


opened, keyed = api_of(fuzz_app()), api_of(fuzz_app(api_keys=KEY, admin_api_keys=ADMIN_KEY))
keyed.config.auth.openapi.schemes["key"] = HttpBearerAuthConfig(bearer=KEY)
keyed.config.auth.openapi.schemes["admin"] = HttpBearerAuthConfig(bearer=ADMIN_KEY)


@pytest.fixture(autouse=True)
def _ready() -> None:
    """Both apps are ready: schemathesis stops every app after each test, and its first request would start it again."""
    for api in (opened, keyed):
        with get_client(api.app) as client:
            while client.get(f"{URL}/ready").status_code != 200:
                time.sleep(0.01)


def streams_as_documented(_: CheckContext, response: Response, case: Case[Any]) -> None:
    """Every event matches its model, and the stream ends as it must."""
    if response.headers["content-type"][0].startswith("text/event-stream"):
        Streams(case.operation.schema.raw_schema).check(case.operation.path, response.text)


def json_as_the_standard_has_it(_: CheckContext, response: Response, case: Case[Any]) -> None:
    """Neither NaN nor Infinity, which Python's reader would let pass."""
    if response.headers["content-type"][0] == "application/json":
        strictly(response.content)


OWN_CHECKS: list[Callable[[CheckContext, Response, Case[Any]], bool | None]] = [
    streams_as_documented,
    json_as_the_standard_has_it,
]


@opened.parametrize()
@thorough
def test_every_route_keeps_its_word(case: Case[Any]) -> None:
    """All of schemathesis' checks. Half of the valid bodies are brought within the limits of this server, so that
    they are served and not refused, and half of these as a stream."""
    draw = zlib.crc32(repr(case.body).encode(errors="replace"))
    limit = LIMITS.get(case.operation.path)
    is_limited = (
        limit is not None
        and present(case.meta).generation.mode.is_positive
        and isinstance(case.body, dict)
        and draw & 1
    )
    if is_limited:
        assert limit is not None
        assert isinstance(case.body, dict)
        case.body = limit({**case.body, "stream": bool(draw & 2)})
    response = case.call_and_validate(base_url=URL, additional_checks=OWN_CHECKS)
    # A prompt of many strange characters can be longer than the context: each byte is a token here.
    is_too_long = response.status_code == 400 and '"context_length_exceeded"' in response.text
    assert response.status_code == 200 or is_too_long or not is_limited, response.text


@keyed.parametrize()
@thorough
def test_every_route_keeps_its_word_behind_keys(case: Case[Any]) -> None:
    case.call_and_validate(base_url=URL, additional_checks=OWN_CHECKS)


def limited(body: Body) -> Body:
    """What the routes have in common, within what the engines can do."""
    options = {
        "max_tokens": body.get("max_tokens") and body["max_tokens"] % 24 + 1,
        "timeout_s": 60,
        # Above 2**53 schemathesis reckons in floats and leaves the range.
        "seed": body.get("seed") and body["seed"] % 2**53,
        "logit_bias": {str(int(key) % 256): value for key, value in (body.get("logit_bias") or {}).items()},
        "stop_token_ids": [token_id % 256 for token_id in body.get("stop_token_ids") or ()],
        "min_tokens": 0,
    }
    return {name: value for name, value in {**body, **options}.items() if value is not None}


def limited_generate(body: Body) -> Body:
    body = limited(body)
    body.pop("variant", None)
    if "prompt_ids" in body:
        body["prompt_ids"] = [token_id % 256 for token_id in body["prompt_ids"]]
    if "messages" in body:
        body["messages"] = said_by_users(body["messages"])
    else:
        body.pop("tools", None)
    return with_free_tools(body)


def limited_openai(body: Body) -> Body:
    body = limited(body)
    held = ("structured_outputs", *(name for name in body if name.startswith("guided_")))
    for name in ("model", "max_completion_tokens", *held):
        body.pop(name, None)
    body["n"] = body.get("n", 1) % 3 + 1
    if not body.get("stream"):
        body.pop("stream_options", None)
    return body


def limited_text(body: Body) -> Body:
    body = limited_openai(body)
    body.pop("best_of", None)
    prompt = body["prompt"]
    if isinstance(prompt, list):
        body["prompt"] = [known(item) for item in prompt][:8]
    return body


def limited_chat(body: Body) -> Body:
    body = limited_openai(body)
    body["messages"] = said_by_users(body["messages"])
    body.pop("response_format", None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    return with_free_tools(body)


def limited_responses(body: Body) -> Body:
    body = limited(body)
    for name in ("model", "max_tokens", "text", "tool_choice", "include"):
        body.pop(name, None)
    if body.get("max_output_tokens"):
        body["max_output_tokens"] = body["max_output_tokens"] % 24 + 1
    if not isinstance(body["input"], str):
        body["input"] = [{"role": "user", "content": "x"} for _ in body["input"]]
    body["tools"] = for_anyone([tool for tool in body.get("tools") or () if tool["type"] == "function"])
    return body


def limited_messages(body: Body) -> Body:
    body = {**limited(body), "max_tokens": body["max_tokens"] % 24 + 1}
    for name in ("model", "output_config", "tool_choice", "context_management"):
        body.pop(name, None)
    body["messages"] = [{"role": "user", "content": "x"} for _ in body["messages"]]
    body["tools"] = for_anyone(body.get("tools") or ())
    return body


def for_anyone(tools: Sequence[Body]) -> list[Body]:
    """Each once, and called by the model, which is all that this server honours."""
    return list({tool["name"]: {**tool, "allowed_callers": ["direct"]} for tool in tools}.values())


def with_free_tools(body: Body) -> Body:
    """Without a forced call, which needs a schema that the grammar serves, and with each tool once."""
    if body.get("tool_choice") not in (None, "none", "auto"):
        body.pop("tool_choice")
    if body.get("tools"):
        body["tools"] = list({tool["function"]["name"]: tool for tool in body["tools"]}.values())
    return body


def known(item: Any) -> str | float | list[int]:
    if isinstance(item, str):
        return item
    return item % 256 if isinstance(item, int | float) else [token_id % 256 for token_id in item]


def said_by_users(messages: list[Body]) -> list[Body]:
    """A template may want the system's message first. Arguments of calls are JSON."""
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        call["function"]["arguments"] = "{}"
    return [{**message, "role": "user", "content": message.get("content") or "x"} for message in messages]


LIMITS = {
    GENERATE: limited_generate,
    TEXT: limited_text,
    CHAT: limited_chat,
    RESPONSES: limited_responses,
    MESSAGES: limited_messages,
}
