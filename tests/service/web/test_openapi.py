"""The OpenAPI document: every status that a route can answer with, and the shape of its body."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from service.web.messages.answers import EVENTS as MESSAGE_EVENTS
from service.web.responses.answers import EVENTS as RESPONSE_EVENTS
from service.web.schemas.failure import MessagesErrorResponse
from tests.support.fake_engine import FakeEngine, FakeRequest
from tests.support.harness import app_of, client_of, engines_of, two_engines, until

KEY, ADMIN_KEY = "a-key-for-the-tests", "an-admin-key-for-the-tests"
Document = dict[str, Any]
EVERYWHERE = {"413", "421", "500"}
GENERATION = {"200", "400", "401", "404", "413", "421", "422", "429", "500", "503", "504"}
STATUSES = {
    "POST /generate": GENERATION,
    "POST /v1/completions": GENERATION,
    "POST /v1/chat/completions": GENERATION,
    "POST /v1/responses": GENERATION,
    "GET /v1/responses/{response_id}": {"401", "404", "422", *EVERYWHERE},
    "POST /v1/messages": GENERATION,
    "POST /v1/messages/count_tokens": GENERATION - {"504"},
    "POST /tokenize": {"200", "400", "401", "404", "422", "429", "503", *EVERYWHERE},
    "POST /detokenize": {"200", "400", "401", "404", "422", "429", "503", *EVERYWHERE},
    "POST /admin/reload": {"200", "400", "401", "403", "409", "422", *EVERYWHERE},
    "GET /v1/models": {"200", "401", "503", *EVERYWHERE},
    "GET /v1/models/{model}": {"200", "401", "404", "422", "503", *EVERYWHERE},
    "GET /health": {"200", "503", *EVERYWHERE},
    "GET /ready": {"200", "503", *EVERYWHERE},
    "GET /info": {"200", "401", "503", *EVERYWHERE},
    "GET /metrics": {"200", "401", *EVERYWHERE},
    "GET /requests/recent": {"200", "401", *EVERYWHERE},
    "GET /compare": {"200", "401", *EVERYWHERE},
}


@pytest.fixture(scope="module")
def document() -> Document:
    return app_of(two_engines()).openapi()


def operations(document: Document) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_every_status_is_declared(document: Document) -> None:
    assert {label: set(operation["responses"]) for label, operation in operations(document)} == STATUSES


def test_every_body_has_a_schema(document: Document) -> None:
    """Failures of every route the one shape, and nothing of FastAPI's own."""
    for label, operation in operations(document):
        for status, response in operation["responses"].items():
            assert response["description"]
            for media in response["content"].values():
                assert media["schema"], (label, status)
            if int(status) >= 400 and label not in ("GET /health", "GET /ready"):
                schema = response["content"]["application/json"]["schema"]
                model = "MessagesErrorResponse" if "/v1/messages" in label else "ErrorResponse"
                assert schema == {"$ref": f"#/components/schemas/{model}"}, (label, status)
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize(
    ("path", "models"),
    [
        ("/generate", ["Delta", "GenerateResponse", "ErrorResponse"]),
        ("/v1/completions", ["Completion", "ErrorResponse"]),
        ("/v1/chat/completions", ["ChatCompletionChunk", "ErrorResponse"]),
    ],
)
def test_events_of_streams_are_components(document: Document, path: str, models: list[str]) -> None:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    done, event = content["schema"]["properties"]["data"]["anyOf"]
    assert done == {"const": "[DONE]"}
    assert [ref["$ref"].rpartition("/")[2] for ref in event["contentSchema"]["anyOf"]] == models
    for model in models:
        assert document["components"]["schemas"][model]["properties"]


@pytest.mark.parametrize(
    ("path", "models"), [("/v1/responses", RESPONSE_EVENTS), ("/v1/messages", (*MESSAGE_EVENTS, MessagesErrorResponse))]
)
def test_events_with_names_are_components(document: Document, path: str, models: tuple[type[BaseModel], ...]) -> None:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert content["schema"]["required"] == ["event", "data"]
    event = content["schema"]["properties"]["data"]
    names = [ref["$ref"].rpartition("/")[2] for ref in event["contentSchema"]["anyOf"]]
    assert names == [model.__name__ for model in models]
    for name in names:
        assert document["components"]["schemas"][name]["properties"]


def valid(document: Document, path: str, response: httpx.Response, method: str = "get") -> bool:
    """Whether an answer is of the declared shape."""
    declared = document["paths"][path][method]["responses"][str(response.status_code)]
    schema = declared["content"][response.headers["content-type"]]["schema"]
    return bool(Draft202012Validator({**schema, "components": document["components"]}).is_valid(response.json()))


def test_what_is_not_ready_or_not_alive_is_told_as_declared(document: Document) -> None:
    async def go() -> list[httpx.Response]:
        engine = FakeEngine("w8a8", fail_at=1)
        async with client_of(app_of(engines_of(engine))) as client:
            before = [await client.get(path) for path in ("/health", "/ready")]
            await client.post("/generate", json={"prompt": "a"})
            await until(lambda: engine.failure is not None)
            return before + [await client.get(path) for path in ("/health", "/ready")]

    answers = asyncio.run(go())
    assert [answer.status_code for answer in answers] == [200, 200, 503, 503]
    assert [valid(document, path, answer) for path, answer in zip(2 * ("/health", "/ready"), answers, strict=True)] == [
        True,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("label", STATUSES)
def test_what_stands_around_the_routes_answers_as_declared(document: Document, label: str) -> None:
    async def go() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        method, path = label.split()
        key = ADMIN_KEY if path.startswith("/admin/") else KEY
        app = app_of(two_engines(), api_keys=KEY, admin_api_keys=ADMIN_KEY, allowed_hosts="localhost")
        async with client_of(app) as client:
            no_key = await client.request(method, path)
            wrong_name = await client.request(method, path, headers={"host": "evil.example"})
            large = {"authorization": f"Bearer {key}", "content-length": str(1 << 40)}
            return no_key, wrong_name, await client.request(method, path, headers=large)

    no_key, wrong_name, too_large = asyncio.run(go())
    path, method = label.split()[1], label.split(maxsplit=1)[0].lower()
    assert (wrong_name.status_code, too_large.status_code) == (421, 413)
    assert no_key.status_code == (401 if "401" in STATUSES[label] else 200)
    assert all(valid(document, path, answer, method) for answer in (no_key, wrong_name, too_large))


def test_a_key_is_documented_where_it_is_needed() -> None:
    document = app_of(two_engines(), api_keys=KEY, public_routes="page,info").openapi()
    assert document["security"] == [{"key": []}]
    free = {label for label, operation in operations(document) if operation.get("security") == []}
    assert free == {"GET /health", "GET /ready", "GET /info"}


def test_whole_numbers_may_be_written_as_floats() -> None:
    """To JSON, and to JSON schema, 3.0 is an integer."""

    async def go() -> tuple[list[FakeRequest], httpx.Response]:
        engines = two_engines()
        async with client_of(app_of(engines)) as client:
            for path, body in (
                ("/generate", {"prompt_ids": [97.0, 98], "max_tokens": 3.0, "seed": 5.0}),
                ("/v1/completions", {"prompt": [[97.0, 98]], "max_tokens": 3.0, "seed": 5.0, "n": 1.0}),
                ("/generate", {"prompt_ids": [97, 98], "max_tokens": 3, "seed": 5}),
            ):
                assert (await client.post(path, json=body)).status_code == 200
            refused = await client.post("/generate", json={"prompt": "a", "max_tokens": 3.5})
        return engines["w8a8"].submitted, refused

    submitted, refused = asyncio.run(go())
    assert [request.prompt_ids for request in submitted] == [[97, 98]] * 3
    assert [type(token_id) for request in submitted for token_id in request.prompt_ids] == [int] * 6
    assert {(request.params.max_tokens, request.params.seed) for request in submitted} == {(3, 5)}
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "max_tokens")
