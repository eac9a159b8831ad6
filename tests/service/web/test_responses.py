"""POST /v1/responses over fake engines: items to a chat, and its answer to items and events."""

from __future__ import annotations

import asyncio
import json
from itertools import groupby
from typing import Any

import httpx
import pytest

from service.engine.api import SamplingParams
from service.text.json.schema import json_rules
from service.text.tools.format import Format
from service.text.tools.hermes import HERMES
from tests.support.fake_engine import ByteTokenizer, FakeRequest
from tests.support.fuzz import Streams
from tests.support.harness import app_of, client_of, metrics_of, named_events_of, two_engines
from tests.support.narrowed import present
from tests.support.openai_client import openai_of

ROUTE = "/v1/responses"
F = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
SPACE = {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "g"}]}
SEARCH = {"type": "web_search", "external_web_access": False}
CALL_F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CALL_G = '<tool_call>\n{"name": "n.g", "arguments": {}}\n</tool_call>'
FULL = f"<think>\nHm, so.\n</think>\n\nSo:\n{CALL_F}\n{CALL_G}"
KINDS = ["reasoning", "message", "function_call", "function_call"]


def post(
    body: dict[str, Any],
    reply: str = "hello",
    *,
    tool_format: Format | None = HERMES,
    has_reasoning: bool = False,
    **engine_options: Any,
) -> tuple[httpx.Response, list[FakeRequest]]:
    async def go() -> tuple[httpx.Response, list[FakeRequest]]:
        engines = two_engines(reply=reply, max_model_len=4096, **engine_options)
        app = app_of(engines, tokenizer=ByteTokenizer(tool_format, has_reasoning=has_reasoning))
        async with client_of(app) as client:
            response = await client.post(ROUTE, json={"input": "x", **body})
            if body.get("stream") and response.status_code == 200:
                Streams(app.openapi()).check(ROUTE, response.text)
            return response, engines["w8a8"].submitted

    return asyncio.run(go())


def outcome(response: httpx.Response) -> list[tuple[str, str]]:
    """Kind and text of each item of an answer."""
    assert response.status_code == 200, response.text
    return [(item["type"], text_of(item)) for item in response.json()["output"]]


def text_of(item: dict[str, Any]) -> str:
    return item["arguments"] if "arguments" in item else "".join(part["text"] for part in item["content"])


def prompt_of(body: dict[str, Any], **options: Any) -> str:
    response, (request,) = post(body, **options)
    assert response.status_code == 200, response.text
    return bytes(request.prompt_ids).decode()


def test_an_answer_is_one_message() -> None:
    response, (request,) = post({"instructions": "Be brief.", "metadata": {"a": "b"}, "max_output_tokens": 9})
    answer = response.json()
    assert outcome(response) == [("message", "hello")]
    assert (answer["status"], answer["error"], answer["incomplete_details"]) == ("completed", None, None)
    assert answer["usage"] == {
        "input_tokens": len(request.prompt_ids),
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(request.prompt_ids) + 6,
    }
    assert (answer["metadata"], answer["store"], answer["max_output_tokens"]) == ({"a": "b"}, False, 9)
    assert bytes(request.prompt_ids) == b"system:Be brief.\nuser:x\n"
    assert (request.params.max_tokens, request.params.temperature) == (9, 1.0)


def test_an_answer_has_reasoning_text_and_calls_in_order() -> None:
    response, _ = post({"tools": [F, SPACE]}, FULL, has_reasoning=True)
    assert outcome(response) == list(zip(KINDS, ["Hm, so.", "So:", '{"a": 1}', "{}"], strict=True))
    calls = response.json()["output"][2:]
    assert [(call["name"], call.get("namespace")) for call in calls] == [("f", None), ("g", "n")]
    assert response.json()["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert len({item["id"] for item in response.json()["output"]}) == 4


@pytest.mark.parametrize("tokens_per_step", [1, 7, 500])
@pytest.mark.parametrize(
    ("reply", "kinds"), [("hello", ["message"]), (FULL, KINDS), ("", ["message"]), (CALL_F, ["function_call"])]
)
def test_a_stream_adds_up_to_the_whole(tokens_per_step: int, reply: str, kinds: list[str]) -> None:
    body = {"tools": [F, SPACE], "stream": True}
    response, _ = post(body, reply, has_reasoning=True, tokens_per_step=tokens_per_step)
    events = named_events_of(response)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    assert events[-1]["type"] == "response.completed"
    by_item = [list(group) for _, group in groupby(events[2:-1], key=lambda event: event["output_index"])]
    assert [own[0]["item"]["type"] for own in by_item] == kinds
    for own, item in zip(by_item, events[-1]["response"]["output"], strict=True):
        assert_told_in_order(own, item)
    whole, _ = post({**body, "stream": False}, reply, has_reasoning=True)
    assert [(item["type"], text_of(item)) for item in events[-1]["response"]["output"]] == outcome(whole)


def assert_told_in_order(events: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """An item is added, grows, and is done; what it grew by is its text."""
    first, *_, last = events
    assert (first["type"], last["type"]) == ("response.output_item.added", "response.output_item.done")
    assert (first["item"]["status"], last["item"]) == ("in_progress", item)
    assert {event["item_id"] for event in events[1:-1]} == {item["id"]}
    deltas = [event for event in events if event["type"].endswith(".delta")]
    kind = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
    assert {event["type"] for event in deltas} <= {f"response.{kind[item['type']]}.delta"}
    assert "".join(event["delta"] for event in deltas) == text_of(item)
    inner = [event["type"].removeprefix("response.") for event in events[1:-1] if event not in deltas]
    done = f"{kind[item['type']]}.done"
    is_call = item["type"] == "function_call"
    assert inner == ([done] if is_call else ["content_part.added", done, "content_part.done"])


def test_an_answer_that_is_cut() -> None:
    for stream in (False, True):
        response, _ = post({"max_output_tokens": 3, "stream": stream})
        answer = named_events_of(response)[-1]["response"] if stream else response.json()
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert (answer["output"][0]["status"], text_of(answer["output"][0])) == ("incomplete", "hel")


def test_a_stream_that_fails_says_so() -> None:
    response, _ = post({"stream": True}, fail_at=2)
    *_, last = named_events_of(response)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert "the engine of variant 'w8a8' failed" in last["response"]["error"]["message"]


HISTORY: list[dict[str, Any]] = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
    {"type": "message", "role": "user", "content": "c"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "So:", "annotations": [], "logprobs": []}],
    },
    {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}'},
    {"type": "function_call", "call_id": "call_2", "name": "g", "namespace": "n", "arguments": ""},
    {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "done"}]},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Well."}], "encrypted_content": "abc"},
]


def test_items_become_the_messages_of_a_chat() -> None:
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "call_2", "type": "function", "function": {"name": "n.g", "arguments": {}}},
    ]
    prompt = prompt_of({"instructions": "Know all.", "input": HISTORY})
    assert prompt == "\n".join(
        [
            "system:Know all.\n\nBe brief.",
            "user:a\nb\n\nc",
            f"assistant:So:{json.dumps({'reasoning_content': 'Hm.', 'tool_calls': calls})}",
            f"tool:sunny{json.dumps({'tool_call_id': 'call_1'})}",
            f"tool:done{json.dumps({'tool_call_id': 'call_2'})}",
            f"assistant:{json.dumps({'reasoning_content': 'Well.'})}",
        ]
    )


def test_an_answer_can_be_sent_back_unchanged() -> None:
    said = post({"tools": [F, SPACE]}, FULL, has_reasoning=True)[0].json()["output"]
    again = [{"role": "user", "content": "x"}, *said, {"role": "user", "content": "y"}]
    prompt = prompt_of({"input": again, "tools": [F, SPACE]})
    assert 'assistant:So:{"reasoning_content": "Hm, so.", "tool_calls": [' in prompt


def test_tools_as_the_template_and_the_grammar_have_them() -> None:
    shown = [
        {"type": "function", "function": {"name": "f", "parameters": F["parameters"]}},
        {"type": "function", "function": {"name": "n.g"}},
    ]
    assert prompt_of({"tools": [F, SEARCH, SPACE]}).startswith(f"tools:{json.dumps(shown)}\n")
    response, (request,) = post({"tools": [F, SPACE], "tool_choice": {"type": "function", "name": "f"}}, CALL_F)
    assert outcome(response) == [("function_call", '{"a": 1}')]
    assert request.params.grammar is not None
    response, (request,) = post({"tools": [F], "tool_choice": "none"}, CALL_F)
    assert outcome(response) == [("message", CALL_F)]


def test_a_schema_holds_the_text() -> None:
    format_ = {"type": "json_schema", "name": "seven", "schema": {"const": 7}, "strict": True}
    response, (request,) = post({"text": {"format": format_, "verbosity": "low"}}, "7")
    assert request.params.grammar == json_rules({"const": 7}).text()
    assert response.json()["text"] == {"format": format_}


def test_what_reaches_the_template() -> None:
    body = {"reasoning": {"effort": "low", "summary": "auto"}, "chat_template_kwargs": {"enable_thinking": False}}
    assert prompt_of(body).startswith('variables:{"reasoning_effort": "low", "enable_thinking": false}\n')


INERT: dict[str, Any] = {
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "a",
    "client_metadata": {"x": "y"},
    "reasoning": {"summary": "auto"},
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "previous_response_id": None,
    "stream_options": {"include_obfuscation": False},
    "service_tier": "auto",
    "truncation": "disabled",
    "background": False,
    "user": "u",
}


def test_what_has_no_effect_is_accepted() -> None:
    for store in (False, True):
        assert outcome(post({**INERT, "store": store})[0]) == [("message", "hello")]


OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "x"}
REFUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", ["'resp_1'", "send the whole conversation"]),
    ({"conversation": "c"}, "conversation", ["send the whole conversation"]),
    ({"background": True}, "background", ["wait for this one"]),
    ({"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]}, "tools", ["file_search", "send functions"]),
    ({"tools": [{"type": "custom", "name": "patch"}, F]}, "tools", ["`tools.0`", "custom"]),
    ({"tools": [SEARCH]}, "tools", ["nothing but web_search", "leave `tools` out"]),
    ({"tools": [F], "tool_choice": {"type": "web_search"}}, "tool_choice", ["send none, auto, required"]),
    ({"tools": [F, F]}, "tools", ["'f' twice"]),
    ({"tools": [{**SPACE, "tools": [{"type": "function", "name": "g" * 127}]}]}, "tools", ["129", "limit is 128"]),
    ({"input": []}, "input", ["too few"]),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", ["`input.0`", "function_call_output"]),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input", ["`input` has nothing"]),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", ["input_image", "send text alone"]),
    ({"max_output_tokens": 5000}, "max_output_tokens", ["`max_output_tokens` is 5000"]),
    ({"input": "x" * 5000}, "input", ["shorten the prompt"]),
    ({"text": {"format": {"type": "json_schema"}}}, "text", ["no `schema`"]),
    ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text", ["`not`"]),
    ({"include": ["message.output_text.logprobs"]}, "include", ["/v1/chat/completions"]),
    ({"include": ["reasoning.encrypted_content", "what"]}, "include", ["leave 'what' out"]),
    ({"truncation": "auto"}, "truncation", ["'auto'"]),
    ({"logprobs": True}, "logprobs", ["True", "/v1/chat/completions"]),
    ({"top_logprobs": 2}, "top_logprobs", ["2", "/v1/chat/completions"]),
    ({"top_logprobs": False}, "top_logprobs", ["False"]),
    ({"prompt": {"id": "p"}}, "prompt", ["leave it out"]),
    ({"context_management": [{"type": "compaction"}]}, "context_management", ["compaction"]),
    ({"moderation": {"model": "m"}}, "moderation", ["leave it out"]),
    ({"modalities": ["audio"]}, "modalities", ["not a field"]),
    ({"n": 2}, "n", ["not a field"]),
    ({"tools": [{**F, "allowed_callers": ["programmatic"]}]}, "tools", ["programmatic", "direct"]),
    *(
        ({"tools": [{"type": kind}, F]}, "tools", ["`tools.0`", kind, "no tools of its own", "send functions"])
        for kind in (
            "code_interpreter",
            "computer_use_preview",
            "image_generation",
            "mcp",
            "local_shell",
            "shell",
            "apply_patch",
            "tool_search",
            "of_tomorrow",
        )
    ),
    *(
        ({"input": [{"role": "user", "content": [{"type": kind}]}]}, "input", [kind, "send text alone"])
        for kind in ("input_file", "input_audio", "refusal", "computer_screenshot")
    ),
    ({"input": [{**OUTPUT, "output": [{"type": "input_image", "image_url": "u"}]}]}, "input", ["send text alone"]),
    *(
        ({"input": [{"type": kind}]}, "input", ["`input.0`", kind, "function_call_output"])
        for kind in (
            "web_search_call",
            "custom_tool_call",
            "custom_tool_call_output",
            "image_generation_call",
            "computer_call",
            "local_shell_call",
            "mcp_call",
            "compaction",
            "of_tomorrow",
        )
    ),
    *(
        ({"tools": [F], "tool_choice": choice}, "tool_choice", ["send none, auto, required"])
        for choice in ({"type": "custom", "name": "f"}, {"type": "allowed_tools", "mode": "auto", "tools": []})
    ),
    ({"max_tokens": 5}, "max_tokens", ["not a field"]),
    ({"temperature": 3}, "temperature", ["at most 2.0"]),
]


@pytest.mark.parametrize(("body", "param", "words"), REFUSED)
def test_refusals(body: dict[str, Any], param: str, words: list[str]) -> None:
    response, submitted = post(body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], submitted) == (400, param, []), error
    assert [word for word in words if word not in error["message"]] == [], error["message"]


def test_tools_need_a_template_that_knows_them() -> None:
    response, _ = post({"input": HISTORY}, tool_format=None)
    assert "`input` is part of a call of tools" in response.json()["error"]["message"]


def test_nothing_is_stored() -> None:
    async def go() -> tuple[httpx.Response, dict[tuple[str, ...], float]]:
        async with client_of(app_of(two_engines())) as client:
            answer = await client.post(ROUTE, json={"input": "x", "store": True})
            await client.post(ROUTE, json={"input": "x", "background": True})
            return await client.get(f"{ROUTE}/{answer.json()['id']}"), await metrics_of(client)

    response, samples = asyncio.run(go())
    assert (response.status_code, response.json()["error"]["code"]) == (404, "response_not_found")
    assert "stores no answers" in response.json()["error"]["message"]
    assert samples["ottava_refused_requests_total", "field=background", "reason=invalid_value"] == 1
    assert samples["ottava_requests_total", "outcome=stop", "variant=w8a8"] == 1


def test_openais_own_client_goes_the_whole_way_round() -> None:
    """Its helper puts the events together, and what it made is sent back with the function's answer."""

    def reply(ids: list[int], _: SamplingParams) -> str:
        return "It is sunny." if b"tool:sunny" in bytes(ids) else f"Wait.\n{CALL_F}"

    async def go() -> str:
        app = app_of(two_engines(reply=reply, max_model_len=4096), tokenizer=ByteTokenizer(HERMES))
        async with openai_of(app) as client:
            tools: Any = [F]
            said: Any = [{"role": "user", "content": "x"}]
            async with client.responses.stream(model="fake", input=said, tools=tools) as stream:
                response = await stream.get_final_response()
            assert (response.output_text, response.output[1].type) == ("Wait.", "function_call")
            said += [*response.output, {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}]
            answer = await client.responses.create(model="fake", input=said, tools=tools)
            assert present(answer.usage).output_tokens == 13
            return answer.output_text

    assert asyncio.run(go()) == "It is sunny."
