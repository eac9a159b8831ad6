"""POST /v1/messages over fake engines: blocks to a chat, and its answer to blocks and events."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from service.text.json.schema import json_rules
from service.text.tools.calls import Tool
from service.text.tools.forced import call_grammar
from service.text.tools.format import Format
from service.text.tools.hermes import HERMES
from tests.support.fake_engine import ByteTokenizer, FakeRequest
from tests.support.fuzz import Streams
from tests.support.harness import app_of, client_of, metrics_of, named_events_of, two_engines

ROUTE = "/v1/messages"
USER = {"role": "user", "content": "x"}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
F = {"name": "f", "description": "Does it.", "input_schema": PARAMETERS, "cache_control": {"type": "ephemeral"}}
G = {"type": "custom", "name": "g", "input_schema": {"type": "object"}}
CALL_F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CALL_G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
FULL = f"<think>\nHm, so.\n</think>\n\nSo:\n{CALL_F}\n{CALL_G}"
KEY = "a-key-for-the-tests"


def post(
    body: dict[str, Any],
    reply: str = "hello",
    *,
    path: str = ROUTE,
    tool_format: Format | None = HERMES,
    has_reasoning: bool = False,
    takes_later_system: bool = True,
    max_model_len: int = 4096,
    **engine_options: Any,
) -> tuple[httpx.Response, list[FakeRequest]]:
    async def go() -> tuple[httpx.Response, list[FakeRequest]]:
        engines = two_engines(reply=reply, max_model_len=max_model_len, **engine_options)
        tokenizer = ByteTokenizer(tool_format, has_reasoning=has_reasoning, takes_later_system=takes_later_system)
        app = app_of(engines, tokenizer=tokenizer)
        async with client_of(app) as client:
            limit = {"max_tokens": 2048} if path == ROUTE else {}
            response = await client.post(path, json={"messages": [USER], **limit, **body})
            if body.get("stream") and response.status_code == 200 and "fail_at" not in engine_options:
                Streams(app.openapi()).check(ROUTE, response.text)
            return response, engines["w8a8"].submitted

    return asyncio.run(go())


def content_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The blocks of an answer, without the ids of calls."""
    assert response.status_code == 200, response.text
    return [without_id(block) for block in response.json()["content"]]


def without_id(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != "id"}


TEXT = {"type": "text", "text": "hello"}
BLOCKS = [
    {"type": "thinking", "thinking": "Hm, so.", "signature": "unsigned"},
    {"type": "text", "text": "So:"},
    {"type": "tool_use", "name": "f", "input": {"a": 1}},
    {"type": "tool_use", "name": "g", "input": {}},
]


def test_an_answer_is_one_text() -> None:
    response, (request,) = post({"system": "Be brief."})
    answer = response.json()
    assert content_of(response) == [TEXT]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "fake:w8a8")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"] == {
        "input_tokens": len(request.prompt_ids),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 6,
    }
    assert answer["id"].startswith("msg_")
    assert answer["metrics"]["generated_tokens"] == 6
    assert bytes(request.prompt_ids) == b"system:Be brief.\nuser:x\n"
    assert request.params.temperature == 1.0


def test_an_answer_has_reasoning_text_and_calls_in_order() -> None:
    response, _ = post({"tools": [F, G]}, FULL, has_reasoning=True)
    assert (content_of(response), response.json()["stop_reason"]) == (BLOCKS, "tool_use")


@pytest.mark.parametrize("tokens_per_step", [1, 7, 500])
@pytest.mark.parametrize(
    ("reply", "blocks"),
    [("hello", [TEXT]), (FULL, BLOCKS), ("", [{"type": "text", "text": ""}]), (CALL_F, [BLOCKS[2]])],
)
def test_a_stream_adds_up_to_the_whole(tokens_per_step: int, reply: str, blocks: list[dict[str, Any]]) -> None:
    response, _ = post({"tools": [F, G], "stream": True}, reply, has_reasoning=True, tokens_per_step=tokens_per_step)
    first, ping, *middle, delta, last = named_events_of(response)
    assert [first["type"], ping["type"], last["type"]] == ["message_start", "ping", "message_stop"]
    assert (first["message"]["content"], first["message"]["stop_reason"]) == ([], None)
    assert first["message"]["usage"]["output_tokens"] == 0
    assert delta["type"] == "message_delta"
    assert delta["delta"]["stop_reason"] == ("tool_use" if "tool_use" in str(blocks) else "end_turn")
    assert delta["usage"]["output_tokens"] == len(reply) + 1
    assert put_together(middle) == blocks


FIELDS = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}


def put_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that these events start, add to and stop."""
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        if event["type"] == "content_block_start":
            assert (is_open, event["index"]) == (False, len(blocks))
            is_open = True
            blocks.append({**event["content_block"], "partial_json": ""})
        elif event["type"] == "content_block_delta":
            assert (is_open, event["index"]) == (True, len(blocks) - 1)
            name = FIELDS[event["delta"]["type"]]
            blocks[-1][name] += event["delta"][name]
        else:
            assert (is_open, event) == (True, {"type": "content_block_stop", "index": len(blocks) - 1})
            is_open = False
    assert not is_open
    for block in blocks:
        arguments = block.pop("partial_json")
        if block["type"] == "tool_use":
            assert block["input"] == {}
            block["input"] = json.loads(arguments)
    return [without_id(block) for block in blocks]


def test_why_an_answer_ends() -> None:
    ends: list[tuple[dict[str, Any], str, str | None]] = [
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["x", "lo"]}, "stop_sequence", "lo"),
        ({"max_tokens": 100}, "end_turn", None),
    ]
    for body, reason, sequence in ends:
        for stream in (False, True):
            response, _ = post({**body, "stream": stream})
            told = named_events_of(response)[-2]["delta"] if stream else response.json()
            assert (told["stop_reason"], told["stop_sequence"]) == (reason, sequence)


def test_more_tokens_than_the_context_leaves() -> None:
    response, (request,) = post({"max_tokens": 32000}, "a" * 64, max_model_len=64)
    assert request.params.max_tokens == 64 - len(request.prompt_ids)
    assert response.json()["stop_reason"] == "model_context_window_exceeded"


def test_a_call_that_is_cut_has_no_input() -> None:
    cut = CALL_F[: CALL_F.index("1")]
    response, _ = post({"tools": [F], "tool_choice": {"type": "any"}, "max_tokens": len(cut)}, CALL_F)
    assert content_of(response) == [{"type": "tool_use", "name": "f", "input": {}}]
    assert response.json()["stop_reason"] == "max_tokens"


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": None}, {"type": "text", "text": "b"}]},
    {"role": "user", "content": "c"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "redacted_thinking", "data": "d"},
            {"type": "text", "text": "So:"},
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}, "cache_control": {"type": "ephemeral"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"},
            {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True, "content": [TEXT]},
            {"type": "text", "text": "And?"},
        ],
    },
    {"role": "system", "content": "Mind the time."},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_3"}]},
]


def test_blocks_become_the_messages_of_a_chat() -> None:
    calls = [
        {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "toolu_2", "type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    system = [{"type": "text", "text": "x-anthropic-billing-header: a=b"}, {"type": "text", "text": "Be brief."}, TEXT]
    _, (request,) = post({"system": system, "messages": HISTORY})
    assert bytes(request.prompt_ids).decode().splitlines() == [
        "system:Be brief.",
        "hello",
        "user:a",
        "b",
        "",
        "c",
        f"assistant:So:{json.dumps({'reasoning_content': 'Hm.', 'tool_calls': calls})}",
        f"tool:sunny{json.dumps({'tool_call_id': 'toolu_1'})}",
        f"tool:hello{json.dumps({'tool_call_id': 'toolu_2'})}",
        "user:And?",
        "system:Mind the time.",
        f"tool:{json.dumps({'tool_call_id': 'toolu_3'})}",
    ]


def test_a_later_system_message_where_the_template_takes_none() -> None:
    messages = [USER, {"role": "system", "content": "y"}, {"role": "assistant", "content": "z"}, USER]
    _, (request,) = post({"system": "a", "messages": messages}, takes_later_system=False)
    assert bytes(request.prompt_ids).decode() == "system:a\nuser:x\n\ny\nassistant:z\nuser:x\n"


def test_an_answer_can_be_sent_back_unchanged() -> None:
    said = post({"tools": [F, G]}, FULL, has_reasoning=True)[0].json()["content"]
    _, (request,) = post({"messages": [USER, {"role": "assistant", "content": said}, USER], "tools": [F, G]})
    assert b'assistant:So:{"reasoning_content": "Hm, so.", "tool_calls": [' in bytes(request.prompt_ids)


def test_an_assistants_message_at_the_end_is_continued() -> None:
    _, (request,) = post({"messages": [USER, {"role": "assistant", "content": "So"}]})
    assert bytes(request.prompt_ids) == b"user:x\nassistant:So"


CHOICES: list[tuple[dict[str, Any] | None, list[str] | None, bool]] = [
    (None, None, True),
    ({"type": "auto"}, None, True),
    ({"type": "any"}, ["f", "g"], True),
    ({"type": "any", "disable_parallel_tool_use": True}, ["f", "g"], False),
    ({"type": "tool", "name": "f"}, ["f"], False),
]


@pytest.mark.parametrize(("choice", "forced", "is_parallel"), CHOICES)
def test_choices_of_tools(choice: dict[str, Any] | None, forced: list[str] | None, is_parallel: bool) -> None:
    response, (request,) = post({"tools": [F, G], "tool_choice": choice}, CALL_F)
    assert content_of(response) == [BLOCKS[2]]
    tools = [Tool("f", PARAMETERS), Tool("g", {"type": "object"})]
    wanted = [tool for tool in tools if tool.name in (forced or ())]
    rules = call_grammar(wanted, HERMES, {}, is_parallel=is_parallel).text() if wanted else None
    assert request.params.grammar == rules


def test_no_call_and_one_call() -> None:
    response, (request,) = post({"tools": [F], "tool_choice": {"type": "none"}}, CALL_F)
    assert content_of(response) == [{"type": "text", "text": CALL_F}]
    assert bytes(request.prompt_ids) == b"user:x\n"
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert content_of(post({"tools": [F, G], "tool_choice": choice}, f"{CALL_F}{CALL_G}")[0]) == [BLOCKS[2]]


def test_a_schema_holds_the_text() -> None:
    body = {"output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"const": 7}}}}
    response, (request,) = post(body, "7")
    assert request.params.grammar == json_rules({"const": 7}).text()
    assert content_of(response) == [{"type": "text", "text": "7"}]
    assert bytes(request.prompt_ids).startswith(b'variables:{"reasoning_effort": "low"}')


@pytest.mark.parametrize(("kind", "thinks"), [("enabled", "true"), ("adaptive", "true"), ("disabled", "false")])
def test_thinking_reaches_the_template(kind: str, thinks: str) -> None:
    _, (request,) = post({"thinking": {"type": kind, "budget_tokens": 1024 if kind == "enabled" else None}})
    assert f'variables:{{"enable_thinking": {thinks}}}' in bytes(request.prompt_ids).decode()


CLAUDE_CODE: dict[str, Any] = {
    "metadata": {"user_id": json.dumps({"device_id": "a" * 64})},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "cache_control": {"type": "ephemeral"},
    "service_tier": "auto",
    "top_k": 5,
    "container": None,
    "stop_sequences": None,
}


def test_what_has_no_effect_is_accepted() -> None:
    assert content_of(post(CLAUDE_CODE)[0]) == [TEXT]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
REFUSED: list[tuple[dict[str, Any], int, str, list[str]]] = [
    ({"messages": []}, 400, "messages", ["too few"]),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "messages", ["messages.0.content.0", "no images"]),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}]},
        400,
        "messages",
        ["'image'", "send text alone"],
    ),
    ({"messages": [{"role": "user", "content": [BLOCKS[0]]}]}, 400, "messages", ["'thinking'", "'assistant'"]),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": ""}]}]},
        400,
        "messages",
        [],
    ),
    ({"max_tokens": 0}, 400, "max_tokens", ["at least 1"]),
    ({"max_tokens": None}, 422, "max_tokens", []),
    ({"tools": [{"type": "web_search_20250305", "name": "s"}]}, 400, "tools", ["web_search_20250305", "input_schema"]),
    ({"tools": [F], "tool_choice": {"type": "tool"}}, 400, "tool_choice", ["send a `name`"]),
    ({"tools": [F], "tool_choice": {"type": "tool", "name": "h"}}, 400, "tool_choice", ["'h'", "one of: f"]),
    ({"tool_choice": {"type": "any"}}, 400, "tool_choice", ["no `tools`"]),
    ({"stop": ["a"]}, 400, "stop", ["not a field"]),
    ({"stop_sequences": [""]}, 400, "stop_sequences", ["too short"]),
    ({"messages": [{**USER, "content": "x" * 5000}]}, 400, "messages", ["shorten the prompt"]),
    ({"mcp_servers": [{}]}, 400, "mcp_servers", []),
    ({"container": "c"}, 400, "container", ["'c'", "leave it out"]),
    ({"logprobs": True}, 400, "logprobs", ["not a field"]),
    ({"n": 2}, 400, "n", ["not a field"]),
    ({"output_format": {"type": "json_schema"}}, 400, "output_format", ["did you mean `output_config`?"]),
    ({"tools": [{**F, "allowed_callers": ["code_execution_20250825"]}]}, 400, "tools", ["code_execution", "direct"]),
    *(
        ({"context_management": value}, 400, "context_management", ["leave what the model is not to see out of"])
        for value in (
            {"edits": [{"type": "clear_tool_uses_20250919"}]},
            {"edits": [{"type": "compact_20260112"}]},
            {"edits": 1},
            {"edits": [1]},
            5,
            "clear_thinking_",
        )
    ),
    *(
        ({"tools": [{"type": kind, "name": "t"}]}, 400, "tools", [kind, "input_schema"])
        for kind in (
            "bash_20250124",
            "text_editor_20250728",
            "computer_20250124",
            "code_execution_20250825",
            "memory_20250818",
            "mcp_toolset",
            "of_tomorrow",
        )
    ),
    *(
        ({"messages": [{"role": "user", "content": [{"type": kind}]}]}, 400, "messages", [kind, "no documents"])
        for kind in (
            "document",
            "search_result",
            "server_tool_use",
            "web_search_tool_result",
            "container_upload",
            "audio",
            "compaction",
            "of_tomorrow",
        )
    ),
    ({"model": "claude"}, 404, "model", ["'claude'", "fake:w8a8"]),
]


@pytest.mark.parametrize(("body", "status", "param", "words"), REFUSED)
def test_refusals(body: dict[str, Any], status: int, param: str, words: list[str]) -> None:
    response, submitted = post(body)
    told = response.json()
    assert (response.status_code, told["error"]["param"], submitted) == (status, param, []), told
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    assert (told["type"], told["error"]["type"]) == ("error", kind)
    assert [word for word in words if word not in told["error"]["message"]] == [], told["error"]["message"]


def test_a_stream_that_fails_says_so() -> None:
    *_, last = named_events_of(post({"stream": True}, fail_at=2)[0])
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert "the engine of variant 'w8a8' failed" in last["error"]["message"]


def test_tokens_are_counted_without_an_answer() -> None:
    body = {"system": "Be brief.", "messages": HISTORY, "tools": [F], "thinking": {"type": "disabled"}}
    counted, submitted = post(body, path=f"{ROUTE}/count_tokens")
    _, (request,) = post(body)
    assert (counted.json(), submitted) == ({"input_tokens": len(request.prompt_ids)}, [])
    refused, _ = post({"max_tokens": 4}, path=f"{ROUTE}/count_tokens")
    assert (refused.status_code, refused.json()["type"]) == (400, "error")


def test_a_key_may_come_as_anthropics_clients_send_it() -> None:
    async def go() -> tuple[list[httpx.Response], dict[tuple[str, ...], float]]:
        app = app_of(two_engines(), api_keys=f"name:{KEY}", allowed_hosts="localhost", public_routes="metrics")
        body = {"messages": [USER], "max_tokens": 8}
        async with client_of(app) as client:
            answers = [
                await client.post(ROUTE, json=body, headers={"anthropic-version": "2023-06-01", **headers})
                for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}, {"x-api-key": "other"}, {})
            ]
            answers.append(await client.post(ROUTE, json=body, headers={"host": "evil.example"}))
            answers.append(await client.get("/v1/models", headers={"x-api-key": KEY}))
            large = {"x-api-key": KEY, "content-length": str(1 << 40)}
            answers.append(await client.post(ROUTE, headers=large))
            return answers, await metrics_of(client)

    answers, samples = asyncio.run(go())
    assert [answer.status_code for answer in answers] == [200, 200, 401, 401, 421, 200, 413]
    kinds = [answer.json()["error"]["type"] for answer in answers if answer.status_code > 200]
    assert kinds == ["authentication_error", "authentication_error", "invalid_request_error", "request_too_large"]
    assert all(answer.json()["type"] == "error" for answer in answers if answer.status_code > 200)
    assert samples["ottava_requests_total", "outcome=stop", "variant=w8a8"] == 2
