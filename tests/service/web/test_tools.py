"""Tools on both chat routes, over fake engines that answer what a model would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from service.engine.api import SamplingParams
from service.text.json.schema import json_rules
from service.text.tools.calls import Tool
from service.text.tools.forced import call_grammar
from service.text.tools.format import Format
from service.text.tools.hermes import HERMES
from service.text.tools.llama import LLAMA
from service.text.tools.mistral import MISTRAL, MISTRAL_ARGS
from tests.support.fake_engine import ByteTokenizer, FakeGrammars, FakeRequest
from tests.support.harness import app_of, client_of, events_of, two_engines
from tests.support.narrowed import present
from tests.support.openai_client import openai_of

CHAT, GENERATE = "/v1/chat/completions", "/generate"
USER = {"role": "user", "content": "x"}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
F = {"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": PARAMETERS}}
G = {"type": "function", "function": {"name": "g", "strict": True}}
UNSERVED = {"type": "function", "function": {"name": "h", "parameters": {"type": "object", "not": {}}}}
CALL_F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CALL_G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "g"}}
Reply = str | Callable[[list[int], SamplingParams], str]


def post(
    path: str,
    body: dict[str, Any],
    reply: Reply = "hello",
    tool_format: Format | None = HERMES,
    grammars: FakeGrammars | None = None,
    tokens_per_step: int = 1,
) -> tuple[httpx.Response, list[FakeRequest]]:
    async def go() -> tuple[httpx.Response, list[FakeRequest]]:
        engines = two_engines(reply=reply, max_model_len=4096, tokens_per_step=tokens_per_step)
        app = app_of(engines, tokenizer=ByteTokenizer(tool_format), grammars=grammars)
        async with client_of(app) as client:
            response = await client.post(path, json={"messages": [USER], "tools": [F, G], "max_tokens": 2048, **body})
            return response, [request for engine in engines.values() for request in engine.submitted]

    return asyncio.run(go())


def message_of(response: httpx.Response) -> tuple[str | None, list[tuple[str, str]], str]:
    """Content, calls and finish reason of an answer by either route."""
    assert response.status_code == 200, response.text
    answer = response.json()
    if "choices" in answer:
        (choice,) = answer["choices"]
        said, end, content = choice["message"], choice["finish_reason"], choice["message"]["content"]
    else:
        said, end, content = answer, answer["finish_reason"], answer["text"]
    calls = said.get("tool_calls", [])
    assert {call["type"] for call in calls} <= {"function"}
    assert len({call["id"] for call in calls}) == len(calls)
    return content, [(call["function"]["name"], call["function"]["arguments"]) for call in calls], end


ANSWERS: list[tuple[Format, str, str, list[tuple[str, str]], str]] = [
    (HERMES, "hello", "hello", [], "stop"),
    (HERMES, CALL_F, "", [("f", '{"a": 1}')], "tool_calls"),
    (HERMES, f"So:\n{CALL_F}\n{CALL_G}", "So:", [("f", '{"a": 1}'), ("g", "{}")], "tool_calls"),
    (HERMES, '<tool_call>{"name": }</tool_call>', '<tool_call>{"name": }</tool_call>', [], "stop"),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')], "tool_calls"),
    (LLAMA, '{"name": "Bob"}', '{"name": "Bob"}', [], "stop"),
    (MISTRAL, '[TOOL_CALLS][{"name": "g", "arguments": {}}]', "", [("g", "{}")], "tool_calls"),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a": 1}', "", [("f", '{"a": 1}')], "tool_calls"),
]


@pytest.mark.parametrize("path", [CHAT, GENERATE])
@pytest.mark.parametrize(("format_", "reply", "content", "calls", "end"), ANSWERS)
def test_an_answer_is_divided_into_content_and_calls(
    path: str, format_: Format, reply: str, content: str, calls: list[tuple[str, str]], end: str
) -> None:
    response, _ = post(path, {}, reply, format_)
    empty = None if path == CHAT and calls else ""
    assert message_of(response) == (content or empty, calls, end)


@pytest.mark.parametrize("path", [CHAT, GENERATE])
@pytest.mark.parametrize("tokens_per_step", [1, 7, 500])
@pytest.mark.parametrize(("format_", "reply", "content", "calls", "end"), ANSWERS)
def test_a_stream_adds_up_to_the_whole(
    path: str, tokens_per_step: int, format_: Format, reply: str, content: str, calls: list[tuple[str, str]], end: str
) -> None:
    response, _ = post(path, {"stream": True}, reply, format_, tokens_per_step=tokens_per_step)
    text, ends = "", []
    made: list[tuple[str, str]] = []
    for event in events_of(response):
        if "metrics" in event:
            assert message_of(httpx.Response(200, json=event)) == (content, calls, end)
            continue
        choice = event["choices"][0] if "choices" in event else {"delta": event}
        text += choice["delta"].get("content") or choice["delta"].get("text") or ""
        ends.append(choice.get("finish_reason"))
        for delta in choice["delta"].get("tool_calls", []):
            if delta["index"] == len(made):
                assert (set(delta), delta["type"]) == ({"index", "id", "type", "function"}, "function")
                assert set(delta["function"]) == {"name", "arguments"}
                made.append((delta["function"]["name"], ""))
            else:
                assert set(delta) == {"index", "function"}
            name, arguments = made[delta["index"]]
            made[delta["index"]] = name, arguments + delta["function"]["arguments"]
    assert (text, made) == (content, calls)
    if path == CHAT:
        assert ends == [None] * (len(ends) - 1) + [end]


def test_forced_arguments_come_in_pieces() -> None:
    grammars = FakeGrammars()
    response, (request,) = post(
        CHAT, {"stream": True, "tool_choice": "required"}, f"{CALL_F}\n{CALL_G}", grammars=grammars, tokens_per_step=3
    )
    deltas = [delta for event in events_of(response) for delta in event["choices"][0]["delta"].get("tool_calls", [])]
    pieces = [delta["function"]["arguments"] for delta in deltas if delta["index"] == 0]
    assert ("".join(pieces), len(pieces) > 2) == ('{"a": 1}', True)
    assert [delta["function"].get("name") for delta in deltas if "id" in delta] == ["f", "g"]
    rules = call_grammar([Tool("f", PARAMETERS), Tool("g")], HERMES, {}, is_parallel=True).text()
    assert (grammars.compiled, request.params.grammar) == ([rules], rules)


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_a_named_tool_alone_is_called_once(path: str) -> None:
    response, (request,) = post(path, {"tool_choice": NAMED}, CALL_G)
    assert message_of(response)[1:] == ([("g", "{}")], "tool_calls")
    assert request.params.grammar == call_grammar([Tool("g")], HERMES, {}, is_parallel=False).text()


def test_a_call_that_is_cut_off() -> None:
    cut = CALL_F[: CALL_F.index("1")]
    response, _ = post(CHAT, {"tool_choice": "required", "max_tokens": len(cut)}, CALL_F)
    assert message_of(response) == (None, [("f", '{"a": ')], "length")
    response, _ = post(CHAT, {"max_tokens": len(cut)}, CALL_F)
    assert message_of(response) == (cut, [], "length")


def test_one_call_at_most() -> None:
    both = f"{CALL_F}\n{CALL_G}"
    response, _ = post(CHAT, {"parallel_tool_calls": False}, both)
    assert message_of(response)[1] == [("f", '{"a": 1}')]
    _, (request,) = post(CHAT, {"parallel_tool_calls": False, "tool_choice": "required"}, CALL_F)
    rules = call_grammar([Tool("f", PARAMETERS), Tool("g")], HERMES, {}, is_parallel=False).text()
    assert request.params.grammar == rules


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_no_call_at_all(path: str) -> None:
    response, (request,) = post(path, {"tool_choice": "none"}, CALL_F)
    assert message_of(response) == (CALL_F, [], "stop")
    assert bytes(request.prompt_ids) == b"user:x\n"
    response, _ = post(path, {"tool_choice": "none"}, "hello", tool_format=None)
    assert message_of(response) == ("hello", [], "stop")


@pytest.mark.parametrize("choice", [None, "auto"])
def test_tools_reach_the_template_without_what_was_not_sent(choice: str | None) -> None:
    _, (request,) = post(CHAT, {"tool_choice": choice})
    shown = [F, {"type": "function", "function": {"name": "g"}}]
    assert bytes(request.prompt_ids).decode() == f"tools:{json.dumps(shown)}\nuser:x\n"
    assert request.params.grammar is None


def test_a_schema_beside_tools_leaves_the_choice() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}}
    calls = call_grammar([Tool("f", PARAMETERS), Tool("g")], HERMES, {}, is_parallel=True)
    for choice, rules in [("auto", json_rules({"const": 7}) | calls), ("required", calls)]:
        response, (request,) = post(CHAT, {"response_format": wanted, "tool_choice": choice}, CALL_F)
        assert request.params.grammar == rules.text()
        assert message_of(response)[1] == [("f", '{"a": 1}')]
    response, _ = post(CHAT, {"response_format": wanted}, "7")
    assert message_of(response) == ("7", [], "stop")


HISTORY: list[dict[str, Any]] = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "é"]}'}},
            {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_2", "name": "g", "content": [{"type": "text", "text": "done"}]},
]


def test_a_conversation_with_calls_reaches_the_template() -> None:
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, "é"]}}},
        {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    _, (request,) = post(CHAT, {"messages": HISTORY, "tools": []})
    assert bytes(request.prompt_ids).decode().splitlines() == [
        "user:x",
        f"assistant:{json.dumps({'tool_calls': calls})}",
        f"tool:sunny{json.dumps({'tool_call_id': 'call_1'})}",
        f"tool:done{json.dumps({'name': 'g', 'tool_call_id': 'call_2'})}",
    ]


def test_ids_are_made_fit_for_mistral() -> None:
    _, (request,) = post(CHAT, {"messages": HISTORY}, tool_format=MISTRAL)
    said = [json.loads(line[line.index("{") :]) for line in bytes(request.prompt_ids).decode().splitlines()[2:]]
    first, second = [call["id"] for call in said[0]["tool_calls"]]
    assert [said[1]["tool_call_id"], said[2]["tool_call_id"]] == [first, second]
    assert all(len(id_) == 9 and id_.isalnum() for id_ in (first, second))
    response, _ = post(CHAT, {}, '[TOOL_CALLS][{"name": "g", "arguments": {}}]', tool_format=MISTRAL)
    assert len(response.json()["choices"][0]["message"]["tool_calls"][0]["id"]) == 9


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice", ["'h'", "f, g"]),
        ({"tools": [F, F]}, "tools", ["'f' twice"]),
        ({"tools": [UNSERVED], "tool_choice": "required"}, "tools", ["tool 'h'"]),
    ],
)
@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_refusals(path: str, body: dict[str, Any], param: str, words: list[str]) -> None:
    response, submitted = post(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], submitted) == (400, param, [])
    assert [word for word in words if word not in error["message"]] == []


def test_choices_call_on_their_own() -> None:
    def reply(_: list[int], params: SamplingParams) -> str:
        return [CALL_F, "hello", CALL_G][present(params.seed)]

    response, _ = post(CHAT, {"n": 3, "seed": 0, "stream": True}, reply)
    ends = {
        choice["index"]: choice["finish_reason"]
        for event in events_of(response)
        for choice in event["choices"]
        if choice["finish_reason"]
    }
    assert ends == {0: "tool_calls", 1: "stop", 2: "tool_calls"}


def test_a_comparison_has_the_calls_of_both() -> None:
    response, _ = post(GENERATE, {"compare": True}, CALL_F)
    answer = response.json()
    for each in (answer, answer["baseline"]):
        assert [call["function"]["name"] for call in each["tool_calls"]] == ["f"]
    assert answer["agreement"]["match_ratio"] == 1


def test_openais_own_client_goes_the_whole_way_round() -> None:
    """Its helper for streams puts the deltas together, and what it made is sent back with the tool's answer."""

    def reply(ids: list[int], _: SamplingParams) -> str:
        return "It is sunny." if b"tool:sunny" in bytes(ids) else f"Wait.\n{CALL_F}"

    async def go() -> str:
        app = app_of(two_engines(reply=reply, max_model_len=4096), tokenizer=ByteTokenizer(HERMES))
        async with openai_of(app) as client:
            messages: list[Any] = [USER]
            tools: Any = [F]
            async with client.chat.completions.stream(model="fake", messages=messages, tools=tools) as stream:
                said = (await stream.get_final_completion()).choices[0].message
            (call,) = present(said.tool_calls)
            assert (said.content, call.function.name, call.function.arguments) == ("Wait.", "f", '{"a": 1}')
            messages += [said, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
            answer = await client.chat.completions.create(model="fake", messages=messages, tools=tools)
            assert isinstance(answer, openai.types.chat.ChatCompletion)
            return present(answer.choices[0].message.content)

    assert asyncio.run(go()) == "It is sunny."
