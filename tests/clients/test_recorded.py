"""Replays what clients send, and checks what they would read of the answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.web.openai.answers import ChatCompletion, ChatCompletionChunk, Completion
from tests.clients.app import CITY, FINAL, HELLO, RESULT, SUNNY, clients_app
from tests.support.harness import client_of, events_of

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
CASES = [
    pytest.param(request["path"], request["body"], id=f"{path.stem}-{place}")
    for path in RECORDED
    for place, request in enumerate(json.loads(path.read_text(encoding="utf-8"))["requests"])
]


def ask(path: str, body: dict[str, Any]) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client_of(clients_app()) as client:
            return await client.post(path, json=body)

    return asyncio.run(go())


def read(path: str, body: dict[str, Any], response: httpx.Response) -> tuple[str, list[tuple[str, Any]], str]:
    """Content, calls and finish reason, from an answer or put together from its stream as clients do it."""
    if path == "/v1/completions":
        only = Completion.model_validate(response.json()).choices[0]
        return only.text, [], str(only.finish_reason)
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


@pytest.mark.parametrize(("path", "body"), CASES)
def test_a_request_of_a_client_is_answered_as_it_expects(path: str, body: dict[str, Any]) -> None:
    response = ask(path, body)
    assert response.status_code == 200, response.text
    content, calls, end = read(path, body, response)
    tools = [tool["function"]["name"] for tool in body.get("tools", [])]
    is_answered = RESULT in json.dumps(body)
    wanted = [name for name in tools if (name == FINAL) == is_answered]
    is_forced = body.get("tool_choice", "auto") not in ("auto", "none")
    if wanted or (tools and is_forced):
        name = (wanted or tools)[0]
        assert [called for called, _ in calls] == [name]
        assert {key: CITY[key] for key in calls[0][1]} == calls[0][1] != {}
        assert (content, end) == ("", "tool_calls")
    elif (body.get("response_format") or {"type": "text"})["type"] != "text":
        assert (json.loads(content), calls, end) == (CITY, [], "stop")
    else:
        assert (content, calls, end) == (SUNNY if is_answered else HELLO, [], "stop")


def test_every_client_is_recorded_with_its_version() -> None:
    clients = [json.loads(path.read_text(encoding="utf-8"))["client"] for path in RECORDED]
    assert len({*clients}) == len(clients) == 8
    assert all(any(char.isdigit() for char in client) for client in clients)
