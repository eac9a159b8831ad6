"""Replays what clients send, and checks what they would read of the answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.web.messages.answers import AnthropicMessage, TokenCount, ToolUseContent
from service.web.openai.answers import ChatCompletion, ChatCompletionChunk, Completion
from service.web.responses.answers import ModelResponse, OutputCall, OutputMessage
from tests.clients.app import CITY, FINAL, HELLO, RESULT, SHELLS, SUNNY, clients_app, known
from tests.support.harness import client_of, events_of, named_events_of

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
CASES = [
    pytest.param(request["path"], request["body"], id=f"{path.stem}-{place}")
    for path in RECORDED
    for place, request in enumerate(json.loads(path.read_text(encoding="utf-8"))["requests"])
]
Body = dict[str, Any]
Read = tuple[str, list[tuple[str, Any]], str]
"""Content, calls and finish reason, the last as chats have it."""


def ask(path: str, body: Body) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client_of(clients_app()) as client:
            return await client.post(path, json=body)

    return asyncio.run(go())


def read_chat(body: Body, response: httpx.Response) -> Read:
    """An answer, or what is put together from its stream as clients do it."""
    if not body.get("stream"):
        answer = ChatCompletion.model_validate(response.json()).choices[0]
        made = [(call.function.name, json.loads(call.function.arguments)) for call in answer.message.tool_calls]
        return answer.message.content or "", made, str(answer.finish_reason)
    text, calls, end = "", list[list[str]](), ""
    events = [ChatCompletionChunk.model_validate(event) for event in events_of(response)]
    wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    assert (not events[-1].choices and events[-1].usage is not None) == wants_usage
    for choice in (choice for event in events for choice in event.choices):
        text += choice.delta.content or ""
        end = str(choice.finish_reason or end)
        for delta in choice.delta.tool_calls:
            if delta.id is not None:
                assert delta.index == len(calls)
                calls.append([delta.function.name or "", ""])
            calls[delta.index][1] += delta.function.arguments
    return text, [(name, json.loads(arguments)) for name, arguments in calls], end


def read_completion(_: Body, response: httpx.Response) -> Read:
    only = Completion.model_validate(response.json()).choices[0]
    return only.text, [], str(only.finish_reason)


def read_response(body: Body, response: httpx.Response) -> Read:
    answer = ModelResponse.model_validate(response.json() if not body.get("stream") else ended(response))
    texts = [part.text for item in answer.output if isinstance(item, OutputMessage) for part in item.content]
    calls = [(item.name, json.loads(item.arguments)) for item in answer.output if isinstance(item, OutputCall)]
    assert answer.status == "completed"
    return "".join(texts), calls, "tool_calls" if calls else "stop"


def ended(response: httpx.Response) -> Any:
    """The whole answer in a stream's last event, after the same in its deltas."""
    events = named_events_of(response)
    answer = events[-1]["response"]
    deltas = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    whole = (item["arguments"] if "arguments" in item else item["content"][0]["text"] for item in answer["output"])
    assert deltas == "".join(whole)
    return answer


def read_message(body: Body, response: httpx.Response) -> Read:
    if not body.get("stream"):
        answer = AnthropicMessage.model_validate(response.json())
        calls = [(block.name, dict(block.input)) for block in answer.content if isinstance(block, ToolUseContent)]
        texts = [block.text for block in answer.content if block.type == "text"]
        return "".join(texts), calls, ENDS[str(answer.stop_reason)]
    text, made, end = "", list[list[str]](), ""
    for event in named_events_of(response):
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            made.append([event["content_block"]["name"], ""])
        if event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
            made[-1][1] += event["delta"]["partial_json"]
        elif event["type"] == "content_block_delta":
            text += event["delta"]["text"]
        if event["type"] == "message_delta":
            end = ENDS[event["delta"]["stop_reason"]]
    return text, [(name, json.loads(arguments)) for name, arguments in made], end


ENDS = {"end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length"}
READ = {
    "/v1/completions": read_completion,
    "/v1/chat/completions": read_chat,
    "/v1/responses": read_response,
    "/v1/messages": read_message,
}


def tools_of(body: Body) -> dict[str, Any]:
    """The names of the functions, whichever format they are in, and what each may be called with here."""
    shown = [tool.get("function", tool) for tool in body.get("tools") or ()]
    functions = [tool for tool in shown if tool.get("type") not in ("web_search", "namespace")]
    return {tool["name"]: arguments_of(tool) for tool in functions}


def arguments_of(tool: dict[str, Any]) -> dict[str, Any]:
    names = tool.get("parameters", tool.get("input_schema", {})).get("properties", {})
    return {name: value for name, value in known(tool["name"]).items() if name in names}


def wants_json(path: str, body: Body) -> bool:
    formats = {
        "/v1/responses": (body.get("text") or {}).get("format"),
        "/v1/messages": (body.get("output_config") or {}).get("format"),
    }
    wanted = formats.get(path, body.get("response_format")) or {"type": "text"}
    return bool(wanted["type"] != "text")


def is_forced(choice: Any) -> bool:
    kind = choice.get("type") if isinstance(choice, dict) else choice
    return kind not in (None, "auto", "none")


@pytest.mark.parametrize(("path", "body"), CASES)
def test_a_request_of_a_client_is_answered_as_it_expects(path: str, body: Body) -> None:
    response = ask(path, body)
    assert response.status_code == 200, response.text
    if path == "/v1/messages/count_tokens":
        assert TokenCount.model_validate(response.json()).input_tokens > 0
        return
    content, calls, end = READ[path](body, response)
    tools = tools_of(body)
    sent = json.dumps(body)
    is_answered = RESULT in sent or '"role": "tool"' in sent
    wanted = [name for name in tools if (name == FINAL) == is_answered]
    if wanted or (tools and is_forced(body.get("tool_choice"))):
        name = next((name for name in tools if name in SHELLS), (wanted or list(tools))[0])
        assert (content, calls, end) == ("", [(name, tools[name])], "tool_calls")
    elif wants_json(path, body):
        assert (json.loads(content), calls, end) == (CITY, [], "stop")
    else:
        cut = HELLO.partition(next(iter(body.get("stop_sequences") or ()), HELLO[-1] * 2))[0]
        assert (content, calls, end) == (SUNNY if is_answered else cut, [], "stop")


def test_every_client_is_recorded_with_its_version() -> None:
    clients = [json.loads(path.read_text(encoding="utf-8"))["client"] for path in RECORDED]
    assert len(clients) == 13
    assert all(any(char.isdigit() for char in client) for client in clients)
