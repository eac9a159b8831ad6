"""What the fuzz tests share: the app that they ask, how often, and what every answer of it must be.

FUZZ_EXAMPLES is the number of examples of each property, 30 unless set: `FUZZ_EXAMPLES=2000 make test
ARGS='tests/service -k fuzz'` runs tens of thousands of requests.
"""

import json
import os
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, settings
from jsonschema import Draft202012Validator

from service.text.chat_template import ChatTemplate
from service.text.tokenizer import Tokenizer
from tests.support.fake_engine import INFO
from tests.support.harness import app_of, two_engines
from tests.support.tokenizers import TEMPLATE, byte_level_backend

TOOLS = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
MAX_MODEL_LEN = 4096
TYPES = {"invalid_request_error", "authentication_error", "rate_limit_error", "overloaded_error", "timeout_error"}
ANTHROPIC_TYPES = TYPES | {"not_found_error", "request_too_large"}
LAST = {
    "/v1/responses": ("response.completed", "response.incomplete", "response.failed"),
    "/v1/messages": ("message_stop", "error"),
}
"""The names that the last event may have, of streams whose events have names."""

# The same examples in every run. An example is a whole request, so it is neither timed nor shrunk for minutes.
thorough = settings(
    max_examples=NUM_EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def fuzz_app(**options: Any) -> FastAPI:
    """The whole app over fake engines and a real tokenizer, with a chat template and a compiler of grammars."""
    engines = two_engines(reply="naïve 😀 end", max_model_len=MAX_MODEL_LEN, tokens_per_step=8)
    tokenizer = Tokenizer(byte_level_backend(), frozenset({0}), ChatTemplate(TOOLS + TEMPLATE, {}))
    return app_of(engines, tokenizer=tokenizer, info=replace(INFO, vocab_size=tokenizer.vocab_size), **options)


def strictly(text: str | bytes) -> Any:
    """The JSON value; neither NaN nor Infinity is one."""

    def refuse(literal: str) -> object:
        raise AssertionError(f"{literal} is no JSON")

    return json.loads(text, parse_constant=refuse)


def assert_told(answer: object) -> None:
    """An answer that is no success has the documented shape, and blames the client, who is told how to go on."""
    assert isinstance(answer, dict)
    is_anthropic = answer.pop("type", None) == "error"
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in (ANTHROPIC_TYPES if is_anthropic else TYPES)
    assert len(error["message"]) < 2000
    assert error["param"] is None or isinstance(error["param"], str)


class Streams:
    """Holds the streams of an app against its OpenAPI."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._validators: dict[str, Draft202012Validator] = {}

    def check(self, path: str, text: str) -> int:
        """The number of events; the last is [DONE], or an error where the time of the request was over."""
        *events, rest = text.split("\n\n")
        assert rest == ""
        if path in LAST:
            return self._check_named(path, events)
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        *data, last = [event.removeprefix("data: ") for event in events]
        if last != "[DONE]":
            error = strictly(last)
            assert_told(error)
            assert error["error"]["code"] == "deadline_exceeded"
        assert data or last != "[DONE]"
        for event in data:
            self._validator(path).validate(strictly(event))
        return len(events)

    def _check_named(self, path: str, events: list[str]) -> int:
        for event in events:
            name, data = event.split("\n")
            body = strictly(data.removeprefix("data: "))
            assert name == f"event: {body['type']}"
            assert (body["type"] in LAST[path]) == (event is events[-1])
            if body["type"] == "error":
                assert_told(dict(body))
            self._validator(path).validate(body)
        return len(events)

    def _validator(self, path: str) -> Draft202012Validator:
        """Of the events of a route, errors aside."""
        if path not in self._validators:
            content = self._document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
            data = content["schema"]["properties"]["data"]
            data = data["anyOf"][1] if "anyOf" in data else data
            models = [model for model in data["contentSchema"]["anyOf"] if not model["$ref"].endswith("/ErrorResponse")]
            schema = {"anyOf": models, "components": self._document["components"]}
            self._validators[path] = Draft202012Validator(schema)
        return self._validators[path]
