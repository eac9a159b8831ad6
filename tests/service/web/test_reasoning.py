"""Reasoning in chats: apart from the content, whole and streamed, beside tools and grammars."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from service.text.chat_template import ChatTemplate
from service.text.tokenizer import Tokenizer
from service.text.tools.format import Format
from service.text.tools.hermes import HERMES
from service.web.openai.plans import is_opened
from tests.support.fake_engine import ByteTokenizer, FakeRequest
from tests.support.harness import app_of, client_of, events_of, two_engines
from tests.support.tokenizers import byte_level_backend

USER = {"role": "user", "content": "x"}
ANSWER = "<think>\nHm, so.\n</think>\n\nYes."
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
F = {"type": "function", "function": {"name": "f"}}


def post(
    body: dict[str, Any],
    reply: str = ANSWER,
    *,
    tool_format: Format | None = HERMES,
    has_reasoning: bool = True,
    tokens_per_step: int = 1,
) -> tuple[httpx.Response, FakeRequest]:
    async def go() -> tuple[httpx.Response, FakeRequest]:
        engines = two_engines(reply=reply, max_model_len=999, tokens_per_step=tokens_per_step)
        tokenizer = ByteTokenizer(tool_format, has_reasoning=has_reasoning)
        async with client_of(app_of(engines, tokenizer=tokenizer)) as client:
            response = await client.post("/v1/chat/completions", json={"messages": [USER], **body})
            assert response.status_code == 200, response.text
            return response, engines["w8a8"].submitted[0]

    return asyncio.run(go())


def test_reasoning_is_apart_from_the_content() -> None:
    message = post({})[0].json()["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Hm, so."
    assert message["content"] == "Yes."


def test_templates_without_it_have_no_such_fields() -> None:
    message = post({}, has_reasoning=False)[0].json()["choices"][0]["message"]
    assert (message["content"], set(message)) == (ANSWER, {"role", "content", "refusal"})
    message = post({}, "Yes.")[0].json()["choices"][0]["message"]
    assert (message["content"], set(message)) == ("Yes.", {"role", "content", "refusal"})


@pytest.mark.parametrize("tokens_per_step", [1, 5, 100])
def test_a_stream_adds_up(tokens_per_step: int) -> None:
    events = events_of(post({"stream": True}, tokens_per_step=tokens_per_step)[0])
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm, so."
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Hm, so."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
    assert all(set(delta) > {"role"} or delta for delta in deltas)


def test_a_prompt_that_opens_the_reasoning() -> None:
    message = post({"messages": [USER, {"role": "assistant", "content": "<think>\n"}]}, "so.</think>Yes.")[0].json()
    assert message["choices"][0]["message"]["reasoning"] == "so."
    closed = [USER, {"role": "assistant", "content": "<think></think>"}]
    said = post({"messages": closed}, "Yes.</think>")[0].json()["choices"][0]["message"]
    assert (said["content"], said.get("reasoning")) == ("Yes.</think>", None)


def test_an_answer_that_is_cut_in_its_reasoning_has_no_content() -> None:
    choice = post({"max_tokens": 12})[0].json()["choices"][0]
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (None, "Hm,")
    assert choice["finish_reason"] == "length"


def test_calls_behind_reasoning() -> None:
    choice = post({"tools": [F]}, f"<think>{CALL}</think>\n{CALL}")[0].json()["choices"][0]
    assert choice["message"]["reasoning"] == CALL
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["f"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")


def test_an_answer_that_is_held_to_a_grammar_is_content() -> None:
    response, request = post({"response_format": {"type": "json_object"}}, '{"a": "<think>"}')
    assert request.params.grammar is not None
    assert response.json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": '{"a": "<think>"}',
        "refusal": None,
    }


def test_what_was_thought_and_what_a_template_may_know_reach_it() -> None:
    past = {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}
    body = {
        "messages": [USER, past, USER],
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
    }
    prompt = bytes(post(body)[1].prompt_ids).decode()
    assert 'assistant:Yes.{"reasoning_content": "Hm."}' in prompt
    assert 'variables:{"reasoning_effort": "low", "enable_thinking": false}' in prompt


def test_variables_of_the_template() -> None:
    source = "{{ enable_thinking }}|{{ messages[0].content }}|{{ tools }}<think>"
    template = ChatTemplate(source, {})
    assert template.has_reasoning
    given = {"enable_thinking": False, "messages": [], "tools": [1]}
    assert template.render([USER], variables=given) == "False|x|None<think>"


@pytest.mark.parametrize(
    ("end", "opened"),
    [("<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("", False), ("a</think>", False)],
)
def test_whether_a_prompt_opens_the_reasoning(end: str, opened: bool) -> None:
    tokenizer = Tokenizer(byte_level_backend(), frozenset({0}))
    assert is_opened(tokenizer.encode("hello world" * 9 + end), tokenizer) is opened
