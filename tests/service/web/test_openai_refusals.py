"""What OpenAI's routes refuse, by name and with the remedy, and what they accept because it changes nothing."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest

from service.errors import InvalidRequest, QueueFull
from service.text.json.schema import choice_rules, json_grammar
from tests.support.fake_engine import INFO, FakeGrammars, FakeRequest
from tests.support.harness import app_of, client_of, metrics_of, two_engines

USER = [{"role": "user", "content": "x"}]
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
NEEDED: dict[str, dict[str, object]] = {TEXT: {"prompt": "a"}, CHAT: {"messages": USER}, "/generate": {}}


def post(path: str, body: Mapping[str, object], **app_options: Any) -> tuple[httpx.Response, list[FakeRequest]]:
    """One POST and what reached the engines."""

    async def go() -> tuple[httpx.Response, list[FakeRequest]]:
        engines = two_engines()
        async with client_of(app_of(engines, **app_options)) as client:
            content, kind = json.dumps({**NEEDED[path], **body}), {"content-type": "application/json"}
            response = await client.post(path, content=content, headers=kind)
            return response, [request for engine in engines.values() for request in engine.submitted]

    return asyncio.run(go())


def tool(name: str, **more: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, **more}}


def called(arguments: str) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}


BOTH = [
    ({"presence_penalty": 2.5}, 400, "presence_penalty", ["2.5", "at most 2"]),
    ({"presence_penalty": False}, 422, "presence_penalty", ["False"]),
    ({"frequency_penalty": -3}, 400, "frequency_penalty", ["-3", "at least -2"]),
    ({"logit_bias": {"256": -100}}, 400, "logit_bias", ["token 256", "0 to 255"]),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias", ["101", "at most 100"]),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", ["'x'", "does not match"]),
    ({"stop_token_ids": [3, -1]}, 400, "stop_token_ids", ["token -1", "0 to 255"]),
    ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens", ["`min_tokens` is 9", "at most 8"]),
    ({"min_token": 3}, 400, "min_token", ["not a field", "did you mean `min_tokens`"]),
    ({"use_beam_search": True}, 400, "use_beam_search", ["not a field", "leave it out"]),
    ({"max_token": None}, 400, "max_token", ["did you mean `max_tokens`"]),
    ({"n": 0}, 400, "n", ["at least 1"]),
    ({"n": 129}, 400, "n", ["at most 128"]),
    ({"n": True}, 422, "n", ["True"]),
    ({"temperature": 2.5}, 400, "temperature", ["at most 2"]),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", ["`stream` is false", "leave it out"]),
    ({"stream": True, "stream_options": {"nope": 1}}, 400, "stream_options", ["stream_options.nope"]),
    ({"user": 5}, 422, "user", ["5"]),
    ({"model": "int4"}, 404, "model", ["'int4'", "fake:w8a8"]),
    ({"model": "w8a8:fake"}, 404, "model", ["w8a8:fake"]),
    ({"model": "\ud800"}, 404, "model", ["use one of"]),
    ({"max_tokens": 64}, 400, "max_tokens", ["leaves", "largest possible"]),
    ({"timeout_s": 1e9}, 400, "timeout_s", ["above"]),
]
ONLY_TEXT = [
    ({"best_of": 3}, 400, "best_of", ["`best_of` is 3", "`n` is 1", "send 1"]),
    ({"suffix": "end"}, 400, "suffix", ["does not honour"]),
    ({"logprobs": 21}, 400, "logprobs", ["at most 20"]),
    ({"logprobs": True}, 422, "logprobs", ["True"]),
    ({"max_tokens": -1}, 400, "max_tokens", ["at least 0"]),
    ({"tools": []}, 400, "tools", ["not a field"]),
    ({"prompt": 5}, 422, "prompt", ["token ids"]),
    ({"prompt": None}, 422, "prompt", ["None"]),
    ({"prompt": ["a", 1]}, 422, "prompt", ["token ids"]),
    ({"prompt": [True]}, 422, "prompt", ["True"]),
    ({"prompt": ""}, 400, "prompt", ["empty"]),
    ({"max_completion_tokens": 3, "max_tokens": 2}, 400, "max_tokens", ["one of them"]),
    ({"prompt": []}, 400, "prompt", ["empty"]),
    ({"prompt": ["a", ""]}, 400, "prompt", ["empty"]),
    ({"prompt": [[1], []]}, 400, "prompt", ["empty"]),
    ({"prompt": [1, 256]}, 400, "prompt", ["256", "0 to 255"]),
    ({"prompt": ["a", "\ud800"]}, 400, "prompt", ["surrogate"]),
    ({"prompt": "x" * 64}, 400, "prompt", ["64 tokens", "at most 63"]),
    ({"prompt": ["a"] * 129}, 400, "prompt", ["129", "limit is 128"]),
    ({"prompt": ["a"] * 65, "n": 2}, 400, "prompt", ["130 answers"]),
]
ONLY_CHAT = [
    ({"tools": [{"type": "function"}]}, 422, "tools", ["`tools.0.function` is missing"]),
    ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, 400, "tools", ["custom", "'function'"]),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools", ["'a b'", "does not match"]),
    ({"tools": [tool("f", parameters={"description": "\ud800"})]}, 400, "tools", ["surrogate"]),
    ({"tools": [tool("f", parameters=[])]}, 422, "tools", ["`tools.0.function.parameters` is []"]),
    ({"tools": [tool("f", arguments={})]}, 400, "tools", ["`tools.0.function.arguments` is not a field"]),
    ({"tools": [tool("f")]}, 400, "tools", ["chat template has no tools", "Hermes", "leave `tools` out"]),
    ({"tool_choice": "required"}, 400, "tool_choice", ["there are no `tools`"]),
    ({"tool_choice": "sometimes"}, 400, "tool_choice", ["sometimes", "none, auto, required"]),
    ({"tool_choice": {"type": "function"}}, 400, "tool_choice", ["no choice of a tool"]),
    ({"tool_choice": ["auto"]}, 400, "tool_choice", ["no choice of a tool"]),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice", ["no `tools`"]),
    ({"parallel_tool_calls": 1}, 422, "parallel_tool_calls", ["1"]),
    ({"functions": [{}]}, 400, "functions", ["does not honour"]),
    ({"function_call": {"name": "f"}}, 400, "function_call", ["does not honour"]),
    ({"modalities": ["text", "audio"]}, 400, "modalities", ["audio"]),
    ({"audio": {"voice": "alloy"}}, 400, "audio", ["alloy"]),
    ({"web_search_options": {}}, 400, "web_search_options", ["does not honour"]),
    ({"min_tokens": 2, "response_format": {"type": "json_object"}}, 400, "min_tokens", ["held to a grammar"]),
    ({"best_of": 1}, 400, "best_of", ["not a field"]),
    ({"top_logprobs": 2}, 400, "top_logprobs", ["`logprobs` is false", "as well"]),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", ["3", "4", "one of them"]),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens", ["at least 1"]),
    ({"max_completion_tokens": 64}, 400, "max_completion_tokens", ["`max_completion_tokens` is 64"]),
    ({"messages": []}, 400, "messages", ["too few"]),
    ({"messages": [{"role": "critic", "content": "x"}]}, 400, "messages", ["critic", "'developer'"]),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", ["chat template has no tools", "leave"]),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages", ["`messages.0`", "no `content`"]),
    ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, 400, "messages", ["`messages.0`", "no `content`"]),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", ["not text"]),
    ({"messages": [{"role": "user", "content": ["x"]}]}, 400, "messages", ["not text"]),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, 422, "messages", ["messages.0.name"]),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        422,
        "messages",
        ["`messages.0.tool_calls.0.function` is missing"],
    ),
    ({"messages": [called("[1]")]}, 400, "messages", ["arguments", "no JSON of an object"]),
    ({"messages": [called("{")]}, 400, "messages", ["no JSON of an object"]),
    ({"messages": [called('{"a": "\\ud800"}')]}, 400, "messages", ["surrogate"]),
    ({"messages": [called("{}")]}, 400, "messages", ["chat template has no tools"]),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format", ["no `json_schema`", "as well"]),
    (
        {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
        400,
        "response_format",
        ["'text'", "leave it out"],
    ),
    ({"response_format": {"type": "xml"}}, 400, "response_format", ["xml"]),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schem": {}}}},
        400,
        "response_format",
        ["`response_format.json_schema.schem` is not a field", "did you mean `schema`"],
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema_": {}}}},
        400,
        "response_format",
        ["`response_format.json_schema.schema_` is not a field"],
    ),
]
CASES = [(path, *case) for path in (TEXT, CHAT) for case in BOTH]
CASES += [(TEXT, *case) for case in ONLY_TEXT] + [(CHAT, *case) for case in ONLY_CHAT]


@pytest.mark.parametrize(("path", "body", "status", "param", "words"), CASES)
def test_a_refusal_names_parameter_and_remedy(
    path: str, body: dict[str, object], status: int, param: str, words: list[str]
) -> None:
    response, submitted = post(path, body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert [word for word in words if word not in error["message"]] == []
    assert not submitted


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (TEXT, {"prompt": "all"}, "prompt", ["spells 'l', which is token 108", "0 to 107", "leave it out"]),
        (TEXT, {"prompt": ["ah", "al"]}, "prompt", ["token 108"]),
        (TEXT, {"prompt": "a" * 5000 + "l"}, "prompt", ["token 108"]),
        (TEXT, {"prompt": [97, 108]}, "prompt", ["holds 108", "0 to 107", "send only those"]),
        (CHAT, {"messages": USER}, "messages", ["spells 'x', which is token 120"]),
        ("/generate", {"prompt": "all"}, "prompt", ["token 108"]),
        ("/generate", {"prompt_ids": [108]}, "prompt_ids", ["holds 108"]),
        ("/generate", {"messages": USER}, "messages", ["token 120"]),
    ],
)
def test_a_token_without_a_row_in_the_model_is_refused_at_the_door(
    path: str, body: dict[str, object], param: str, words: list[str]
) -> None:
    response, submitted = post(path, body, info=replace(INFO, vocab_size=108))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert [word for word in words if word not in error["message"]] == []
    assert not submitted


@pytest.mark.parametrize(("path", "field"), [(TEXT, "prompt"), ("/generate", "prompt_ids")])
def test_rows_beyond_the_tokenizer_are_ids_of_the_model(path: str, field: str) -> None:
    response, submitted = post(path, {field: [97, 299], "top_k": 280}, info=replace(INFO, vocab_size=300))
    assert response.status_code == 200
    assert (submitted[0].prompt_ids, submitted[0].params.top_k) == ([97, 299], 280)


NEUTRAL: dict[str, dict[str, object]] = {
    TEXT: {"best_of": 1, "suffix": "", "max_completion_tokens": 5},
    CHAT: {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "functions": [],
        "modalities": ["text"],
        "reasoning_effort": "high",
        "verbosity": "low",
        "prediction": {"type": "content", "content": "x"},
        "top_logprobs": 0,
        "response_format": {"type": "text"},
        "max_tokens": 5,
        "max_completion_tokens": 5,
    },
}
ALL_NEUTRAL = {
    "user": "u",
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "logit_bias": {"7": 0},
    "stop_token_ids": [],
    "min_tokens": 0,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "store": True,
    "metadata": {"run": "1"},
    "service_tier": "flex",
    "safety_identifier": "u",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
}


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_what_changes_nothing_is_accepted(path: str) -> None:
    plain, asked = post(path, {"seed": 1, "max_tokens": 5})[1], None
    response, asked = post(path, {"seed": 1, "max_tokens": 5, **ALL_NEUTRAL, **NEUTRAL[path]})
    assert response.status_code == 200, response.text
    assert [request.params for request in asked] == [request.params for request in plain]


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_null_is_as_good_as_absent(path: str) -> None:
    async def go() -> dict[str, Any]:
        async with client_of(app_of(two_engines())) as client:
            schemas: dict[str, Any] = (await client.get("/openapi.json")).json()["components"]["schemas"]
            return schemas

    name = "CompletionRequest" if path == TEXT else "ChatRequest"
    optional = [field for field in asyncio.run(go())[name]["properties"] if field not in NEEDED[path]]
    plain = post(path, {})[1]
    response, asked = post(path, dict.fromkeys(optional))
    assert response.status_code == 200, response.text
    assert [request.params for request in asked] == [request.params for request in plain]


def test_a_response_format_becomes_one_grammar_for_all_choices() -> None:
    for wanted, schema in [
        ({"type": "json_object"}, None),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}},
            {"type": "object"},
        ),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, None),
    ]:
        grammars = FakeGrammars()
        response, (first, second) = post(CHAT, {"response_format": wanted, "n": 2}, grammars=grammars)
        assert response.status_code == 200, response.text
        assert grammars.compiled == [json_grammar(schema)]
        assert first.params.grammar == second.params.grammar == json_grammar(schema)


def test_a_schema_that_cannot_be_served() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    response, submitted = post(CHAT, {"response_format": wanted})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    assert not submitted


@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidRequest("too large; simplify it", "response_format"), 400), (QueueFull("4 are being compiled"), 503)],
)
def test_a_grammar_that_the_engine_refuses(error: InvalidRequest | QueueFull, status: int) -> None:
    grammars = FakeGrammars(refuse=error)
    response, submitted = post(CHAT, {"response_format": {"type": "json_object"}}, grammars=grammars)
    assert (response.status_code, response.json()["error"]["code"]) == (status, error.code)
    assert not submitted


def test_text_needs_no_grammar() -> None:
    _, (request,) = post(CHAT, {"response_format": {"type": "text"}})
    assert request.params.grammar is None


def test_refusals_are_counted_once() -> None:
    async def go() -> Mapping[tuple[str, ...], float]:
        async with client_of(app_of(two_engines())) as client:
            await client.post(TEXT, json={"prompt": "a", "model": "int4"})
            await client.post(TEXT, json={"prompt": "a", "tools": 1})
            await client.post(CHAT, json={"messages": USER, "top_logprobs": 1})
            return await metrics_of(client)

    samples = asyncio.run(go())
    runs = {key[1:]: count for key, count in samples.items() if count and key[0] == "ottava_requests_total"}
    assert runs == {("outcome=rejected", "variant=none"): 2.0, ("outcome=rejected", "variant=w8a8"): 1.0}
    assert refused_fields(samples) == {"model": 1.0, "unknown": 1.0, "top_logprobs": 1.0}


def refused_fields(samples: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    """How many requests were refused for each field, whatever the reason."""
    counted = Counter[str]()
    for key, count in samples.items():
        if key[0] == "ottava_refused_requests_total":
            counted[key[1].removeprefix("field=")] += count  # type: ignore[assignment]
    return {field: count for field, count in counted.items() if count}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"messages": [', "body"),
        (b"[]", "body"),
        (b'{"prompt": 5, "messages": []}', "unknown"),
        (b'{"messages": [], "evil\\n\\"": 1}', "unknown"),
        (b'{"messages": [{"role": "user", "content": "x", "nam": 1}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 9}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}', "tool_choice"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 999}', "max_tokens"),
    ],
)
def test_refusals_are_counted_by_field(body: bytes, field: str) -> None:
    async def go() -> tuple[int, Mapping[tuple[str, ...], float]]:
        async with client_of(app_of(two_engines())) as client:
            answer = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
            return answer.status_code, await metrics_of(client)

    status, samples = asyncio.run(go())
    assert status in (400, 422)
    assert refused_fields(samples) == {field: 1.0}


def test_openapi_documents_every_field() -> None:
    async def go() -> dict[str, Any]:
        async with client_of(app_of(two_engines())) as client:
            document: dict[str, Any] = (await client.get("/openapi.json")).json()
            return document

    api = asyncio.run(go())
    schemas = api["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "ChatMessage", "StreamOptions", "ResponseFormat"):
        assert schemas[name]["additionalProperties"] is False
        assert [field for field, shape in schemas[name]["properties"].items() if not shape.get("description")] == []
    for path, answer in ((TEXT, "Completion"), (CHAT, "ChatCompletion")):
        responses = api["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "422", "429", "500", "503", "504"} <= set(responses)
        content = responses["200"]["content"]
        assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{answer}"}
        assert "text/event-stream" in content
    assert not [ref for ref in _refs(api) if ref.removeprefix("#/components/schemas/") not in schemas]


def _refs(node: object) -> Iterator[str]:
    """Every reference of a document."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [value] if key == "$ref" else _refs(value)
    elif isinstance(node, list):
        for item in node:
            yield from _refs(item)


@pytest.mark.parametrize("path", [TEXT, CHAT, "/generate"])
def test_what_is_sent_reaches_the_sampler(path: str) -> None:
    prompt = {"prompt": "a"} if path == "/generate" else {}
    wanted = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "logit_bias": {"7": 2, "9": -100.0},
        "stop_token_ids": [5, 3],
        "min_tokens": 4,
        "max_tokens": 8,
    }
    _, (request,) = post(path, {**prompt, **wanted})
    params = request.params
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -1)
    assert sorted(params.logit_bias) == [(7, 2), (9, -100)]
    assert (params.end_ids, params.held_ids, params.min_tokens) == ((3, 5), (0, 3, 5), 4)


@pytest.mark.parametrize("path", [TEXT, CHAT, "/generate"])
@pytest.mark.parametrize(("sent", "used"), [(1e-8, 0.0), (0.0009, 0.0), (0.001, 0.001), (0, 0.0)])
def test_a_temperature_too_small_for_float32_is_greedy(path: str, sent: float, used: float) -> None:
    prompt = {"prompt": "a"} if path == "/generate" else {}
    _, (request,) = post(path, {**prompt, "temperature": sent})
    assert request.params.temperature == used


DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}


@pytest.mark.parametrize("path", [TEXT, CHAT, "/generate"])
def test_what_the_model_recommends_is_the_default_of_a_request(path: str) -> None:
    prompt = {"prompt": "a"} if path == "/generate" else {}
    info = replace(INFO, sampling_defaults=DEFAULTS)
    _, (request,) = post(path, prompt, info=info)
    assert {name: getattr(request.params, name) for name in DEFAULTS} == DEFAULTS
    own = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    _, (request,) = post(path, {**prompt, **own}, info=info)
    assert {name: getattr(request.params, name) for name in own} == own
    _, (request,) = post(path, {**prompt, "top_k": 3}, info=replace(INFO, sampling_defaults={"top_p": 0.5}))
    assert (request.params.top_k, request.params.top_p) == (3, 0.5)
    assert request.params.temperature == (0 if path == "/generate" else 1)


def test_null_takes_what_the_model_recommends() -> None:
    _, (request,) = post(CHAT, dict.fromkeys(DEFAULTS), info=replace(INFO, sampling_defaults=DEFAULTS))
    assert {name: getattr(request.params, name) for name in DEFAULTS} == DEFAULTS


def test_a_name_reaches_the_template() -> None:
    _, (request,) = post(CHAT, {"messages": [{**USER[0], "name": "Ann"}], "max_tokens": 2})
    assert bytes(request.prompt_ids) == b'user:x{"name": "Ann"}\n'


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(
    ("wanted", "rules"),
    [
        ({"json": {"const": 7}}, json_grammar({"const": 7})),
        ({"choice": ["yes", 'n"o\n']}, choice_rules(["yes", 'n"o\n']).text()),
    ],
)
def test_structured_outputs_become_a_grammar(path: str, wanted: dict[str, object], rules: str) -> None:
    grammars = FakeGrammars()
    response, (request,) = post(path, {"structured_outputs": wanted}, grammars=grammars)
    assert response.status_code == 200, response.text
    assert (grammars.compiled, request.params.grammar) == ([rules], rules)


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({}, ["send one of `json`, `choice`, `regex`, `grammar` and `json_object`"]),
        ({"json": {}, "choice": ["a"]}, ["send one of `json`"]),
        ({"json_object": False}, ["send one of `json`"]),
        ({"json": "no JSON"}, ["`structured_outputs.json` is 'no JSON', which is no JSON of an object"]),
        ({"json": "[" * 100_000}, ["which is no JSON of an object"]),
        ({"choice": []}, ["too few"]),
        ({"choice": [""]}, ["at least 1"]),
        ({"regex": "a" * 5000}, ["5000 characters", "4096"]),
        ({"regex": "a^b"}, ["has `^` or `$` inside"]),
        ({"regex": "a\ud800"}, ["half a surrogate pair"]),
        ({"regex": "a", "disable_any_whitespace": True}, ["does not honour"]),
        ({"regex": "a", "disable_any_whitespace": 0.0}, ["does not honour"]),
        ({"regex": "a", "disable_additional_properties": 0}, ["does not honour"]),
        ({"regex": "a", "structural_tag": "{}"}, ["does not honour"]),
        ({"grammar": "x" * 70_000}, ["70000 bytes", "65536"]),
        ({"grammar": "start: /a/"}, ["`root ::= ...`", "written for Lark"]),
        ({"grammar": 'root ::= Token(5) "a"'}, ["uses Token"]),
        ({"json": {"type": "object", "not": {}}}, ["JSON schema"]),
    ],
)
def test_structured_outputs_that_cannot_be_served(path: str, wanted: dict[str, object], words: list[str]) -> None:
    response, submitted = post(path, {"structured_outputs": wanted})
    assert (response.status_code, submitted) == (400, [])
    assert [word for word in words if word not in response.json()["error"]["message"]] == []


def test_one_of_two_formats() -> None:
    both = {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}}
    response, _ = post(CHAT, both)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "structured_outputs")


GUIDED: list[tuple[str, Any, str]] = [
    ("guided_json", {"type": "boolean"}, "root ::= ref0"),
    ("guided_json", '{"type": "boolean"}', "root ::= ref0"),
    ("guided_choice", ["yes", "no"], '"yes" | "no"'),
    ("guided_regex", "^[a-z]+$", "regex ^[a-z]+$"),
    ("guided_grammar", 'root ::= "a"', 'root ::= "a"'),
]


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(("field", "value", "rules"), GUIDED)
def test_older_names_of_structured_outputs(path: str, field: str, value: Any, rules: str) -> None:
    inert = {"guided_decoding_backend": "outlines", "guided_whitespace_pattern": " "}
    response, submitted = post(path, {field: value, **inert})
    assert response.status_code == 200, response.text
    assert rules in (submitted[0].params.grammar or "")
    name = field.removeprefix("guided_")
    newer, (same,) = post(path, {"structured_outputs": {name: value, "whitespace_pattern": " "}})
    assert (newer.status_code, same.params.grammar) == (200, submitted[0].params.grammar)
    both, _ = post(path, {field: value, "structured_outputs": {name: value}})
    assert (both.status_code, both.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("field", ["guided_regex", "guided_grammar"])
def test_an_older_name_is_the_one_that_is_blamed(field: str) -> None:
    response, _ = post(CHAT, {field: "a" * 70_000})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def test_structural_tags_are_refused_by_name() -> None:
    tag = {"type": "structural_tag", "structures": [], "triggers": ["<f"]}
    response, _ = post(CHAT, {"response_format": tag})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    assert "`tools`" in response.json()["error"]["message"]
