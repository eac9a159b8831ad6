"""hypothesis on the request parser: whatever bytes come, the answer is told in the one shape, and soon."""

import asyncio
import json
import string
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from service.web.messages.requests import CountRequest, MessagesRequest
from service.web.openai.requests import ChatRequest, CompletionRequest
from service.web.responses.requests import ResponsesRequest
from service.web.routes.admin import ReloadRequest
from service.web.schemas.generate import GenerateRequest
from tests.support.fuzz import Streams, assert_told, fuzz_app, strictly, thorough

ROUTES: dict[str, type[BaseModel]] = {
    "/generate": GenerateRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/admin/reload": ReloadRequest,
}
JSON = "application/json"
# A step of the fake engines takes no time: what takes longer than this hangs.
PATIENCE_S = 10.0
FAILED = {400, 404, 405, 409, 413, 422, 504}


class Asker:
    """An app that runs on a loop of its own, and its client."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self.app = fuzz_app(max_body_bytes=1 << 20)
        self.streams = Streams(self.app.openapi())
        self._runner.run(self._open())

    async def _open(self) -> None:
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost")
        while not self.app.state.serving.is_ready:
            await asyncio.sleep(0.01)

    def ask(
        self, path: str, content: bytes, kind: str | bytes | None = JSON, method: str = "POST", **more: Any
    ) -> httpx.Response:
        """The answer, which is a success or a failure that is told."""
        headers = {**more.pop("headers", {}), **({} if kind is None else {"content-type": kind})}

        async def asked() -> httpx.Response:
            async with asyncio.timeout(PATIENCE_S):
                return await self._client.request(method, path, content=content, headers=headers, **more)

        response = self._runner.run(asked())
        route = path.partition("?")[0]
        if response.status_code == 200:
            if response.headers["content-type"].startswith("text/event-stream"):
                self.streams.check(route, response.text)
            else:
                strictly(response.content)
        else:
            assert response.status_code in FAILED, response.text
            assert_told(strictly(response.content))
        return response

    def close(self) -> None:
        engines = self.app.state.serving.engines.values()
        assert [engine.stats().num_running for engine in engines] == [0, 0]
        self._runner.run(self._client.aclose())
        self._runner.run(self._lifespan.__aexit__(None, None, None))
        self._runner.close()


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    asker = Asker()
    yield asker
    asker.close()


NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -0.0, 1.0, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**400, 1e308, 5e-324, float("inf")]),
)
WORDS = st.text(st.characters(), max_size=20) | st.sampled_from(["", "\x00", "\ud800", "\ud83d", "\u202e", "a\udc00b"])
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=12
)
STARTS: dict[type[BaseModel], dict[str, object]] = {
    GenerateRequest: {"prompt": "a"},
    CompletionRequest: {"prompt": "a"},
    ChatRequest: {"messages": [{"role": "user", "content": "a"}]},
    ResponsesRequest: {"input": [{"role": "user", "content": "a"}]},
    MessagesRequest: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
    CountRequest: {"messages": [{"role": "user", "content": "a"}]},
    ReloadRequest: {},
}


def fields(model: type[BaseModel]) -> st.SearchStrategy[dict[str, object]]:
    """Fields of the body that are there, with whatever values."""
    names = st.sampled_from(sorted(model.model_fields)) | WORDS
    return st.dictionaries(names, VALUES, max_size=4)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, object]]:
    """A route, and a body that would be good but for a few of its fields."""
    path, model = draw(st.sampled_from(sorted(ROUTES.items())))
    return path, {**STARTS[model], **draw(fields(model))}


@given(requests(), st.booleans())
@thorough
def test_fields_of_any_value(asker: Asker, request: tuple[str, dict[str, object]], is_ascii: bool) -> None:
    """NaN, infinities and half surrogates included, which Python's writer spells as its reader takes them."""
    path, body = request
    text = json.dumps(body, ensure_ascii=is_ascii)
    asker.ask(path, text.encode(errors="surrogatepass"))


PARTS: list[tuple[str, str, dict[str, object]]] = [
    ("/v1/responses", "input", {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}),
    ("/v1/responses", "input", {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}),
    ("/v1/responses", "input", {"type": "function_call_output", "call_id": "a", "output": "b"}),
    ("/v1/responses", "input", {"type": "reasoning", "summary": [], "content": [], "encrypted_content": None}),
    ("/v1/responses", "tools", {"type": "function", "name": "f", "parameters": {}}),
    ("/v1/responses", "tools", {"type": "namespace", "name": "n", "tools": []}),
    ("/v1/messages", "messages", {"role": "user", "content": [{"type": "text", "text": "a"}]}),
    ("/v1/messages", "tools", {"name": "f", "input_schema": {}}),
]


@given(st.sampled_from(PARTS), st.data())
@thorough
def test_parts_with_fields_of_any_value(
    asker: Asker, part: tuple[str, str, dict[str, object]], data: st.DataObject
) -> None:
    path, field, good = part
    names = st.sampled_from(sorted(good)) | WORDS
    bad = {**good, **data.draw(st.dictionaries(names, VALUES, max_size=3))}
    body = {**STARTS[ROUTES[path]], field: [good, bad]}
    asker.ask(path, json.dumps(body).encode(errors="surrogatepass"))


@given(st.sampled_from(sorted(ROUTES)), VALUES)
@thorough
def test_bodies_of_any_json(asker: Asker, path: str, value: object) -> None:
    asker.ask(path, json.dumps(value).encode(errors="surrogatepass"))


@given(st.sampled_from(sorted(ROUTES)), st.binary(max_size=200))
@example("/generate", b"")
@example("/generate", b"\xff\xfe\x00")
@example("/generate", '{"prompt": "a"}'.encode("utf-16"))
@example("/generate", '{"prompt": "a"}'.encode("utf-32-le"))
@example("/generate", b'\xef\xbb\xbf{"prompt": "a"}')
@thorough
def test_bodies_of_any_bytes(asker: Asker, path: str, content: bytes) -> None:
    asker.ask(path, content)


GOOD = {path: json.dumps(STARTS[model]).encode() for path, model in ROUTES.items()}


@given(st.data())
@thorough
def test_good_bodies_with_a_few_wrong_bytes(asker: Asker, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(ROUTES)))
    content = bytearray(GOOD[path])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    asker.ask(path, bytes(content))


HEADER_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)
HEADERS = st.dictionaries(
    st.sampled_from(["authorization", "x-request-id", "traceparent", "accept", "origin", "cookie", "expect"])
    | st.text(string.ascii_lowercase + "-", min_size=1, max_size=12).filter(lambda name: name != "host"),
    HEADER_TEXT.map(lambda text: text.encode("latin-1")),
    max_size=4,
)
KINDS = (
    st.none() | st.sampled_from([JSON, "application/json; charset=latin-1", "text/plain", "x", ";", ""]) | HEADER_TEXT
)


@given(st.sampled_from(sorted(ROUTES)), KINDS, HEADERS, st.text(max_size=30))
@thorough
def test_any_headers_and_queries(
    asker: Asker, path: str, kind: str | None, headers: dict[str, bytes], query: str
) -> None:
    sent = None if kind is None else kind.encode("latin-1")
    asker.ask(f"{path}?{quote(query, safe='&=', errors='replace')}", GOOD[path], sent, headers=headers)


@given(st.text(max_size=40), st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]))
@thorough
def test_any_path_and_method(asker: Asker, rest: str, method: str) -> None:
    asker.ask(f"/v1/models/{quote(rest, errors='replace')}", b"{}", method=method)


DEPTH = 100_000
HOSTILE = {
    "lists": b"[" * DEPTH + b"]" * DEPTH,
    "objects": b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
    "lists in a field": b'{"prompt": ' + b"[" * DEPTH + b"]" * DEPTH + b"}",
    "nested just short of the parser's limit": b'{"prompt_ids": ' + b"[" * 900 + b"]" * 900 + b"}",
    "digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "a few digits less": b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}",
    "digits in a list": b'{"prompt_ids": [' + b"9" * 5000 + b"]}",
    "exponent": b'{"prompt": "a", "temperature": 1e999999}',
    "negative exponent": b'{"prompt": "a", "temperature": 1e-999999}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "minus Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "Infinity as a seed": b'{"prompt": "a", "seed": Infinity}',
    "surrogate": b'{"prompt": "\\ud800"}',
    "surrogate in a name": b'{"\\ud800": 1}',
    "raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "BOM": b'\xef\xbb\xbf{"prompt": "a"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "not UTF-8": b'{"prompt": "\xff"}',
    "NUL": b'{"prompt": "a"}\x00',
    "two bodies": b'{"prompt": "a"}{"prompt": "a"}',
    "many names": json.dumps({f"x{n}": n for n in range(20_000)}).encode(),
    "a long name": json.dumps({"x" * 500_000: 1}).encode(),
    "the same name": b'{"prompt": "a", ' + b'"seed": "x", ' * 10_000 + b'"seed": 1}',
    "many wrong ids": json.dumps({"prompt_ids": ["x"] * 100_000}).encode(),
    "many stops": json.dumps({"prompt": "a", "stop": ["x"] * 100_000}).encode(),
    "no body": b"",
}
ACCEPTED = {"the same name", "negative exponent", "BOM", "UTF-16"}
SAID = {
    "lists": "too deep inside each other",
    "objects": "too deep inside each other",
    "lists in a field": "too deep inside each other",
    "digits": "more than 4300 digits",
    "a few digits less": "less than 9223372036854775808",
    "exponent": "not a finite number",
    "NaN": "not a finite number",
    "surrogate": "half a surrogate pair",
    "raw surrogate": "half a surrogate pair",
    "not UTF-8": "not valid utf-8, at byte 12; send JSON in UTF-8",
    "two bodies": "at character 15",
    "many wrong ids": "`prompt_ids.0` is 'x'",
    "many stops": "the limit is 16",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies(asker: Asker, name: str) -> None:
    for path in ROUTES:
        response = asker.ask(path, HOSTILE[name])
        assert name in ACCEPTED or response.status_code in (400, 422), response.text
    told = asker.ask("/generate", HOSTILE[name]).text
    assert SAID.get(name, "") in told


SCHEMAS = {
    "NaN": '{"const": NaN}',
    "Infinity": '{"type": "number", "minimum": -Infinity}',
    "surrogate": '{"enum": ["\\ud800"]}',
    "surrogate as a name": '{"properties": {"\\ud800": {}}}',
    "surrogate as a keyword": '{"\\ud800": 1}',
    "digits": '{"type": "integer", "minimum": ' + "9" * 4000 + "}",
    "deep": '{"items": ' * 900 + "{}" + "}" * 900,
    "leads back": '{"$ref": "#"}',
    "digits of a reference": '{"$ref": "#/$defs/a/' + "9" * 5000 + '", "$defs": {"a": [{}]}}',
    "format": '{"type": "string", "format": [[]]}',
    "wide": json.dumps({"enum": list(range(100_000))}),
    "long": '{"type": "array", "minItems": 100000000}',
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_hostile_schemas(asker: Asker, name: str) -> None:
    form = f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {SCHEMAS[name]}}}}}'
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], "response_format": {form}}}'
    response = asker.ask("/v1/chat/completions", body.encode())
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")


SCHEMA_LEAVES = st.sampled_from(
    ["object", "array", "string", "integer", "date", "#", "#/$defs/a", "a", 0, 1, -1, 2.5, True]
)
SCHEMA_WORDS = st.sampled_from(
    [
        *("type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "enum", "const", "anyOf", "oneOf"),
        *("allOf", "$ref", "$defs", "format", "pattern", "a"),
    ]
)
ANY_SCHEMA = st.recursive(
    SCHEMA_LEAVES | LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCHEMA_WORDS, inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(SCHEMA_WORDS, ANY_SCHEMA, max_size=4))
@thorough
def test_schemas_of_any_kind(asker: Asker, schema: dict[str, object]) -> None:
    """Compiled, or refused; never a fault of ours."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {**STARTS[ChatRequest], "response_format": form}
    asker.ask("/v1/chat/completions", json.dumps(body).encode())
