"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest

from service.text.chat_template import ChatTemplate
from service.text.tokenizer import Tokenizer
from service.web.openai import tokenize
from tests.support.fake_engine import INFO
from tests.support.harness import app_of, client_of, two_engines
from tests.support.tokenizers import TEMPLATE, byte_level_backend

TOOLS = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
USER = {"role": "user", "content": "naïve 😀"}
TOOL = {"type": "function", "function": {"name": "f"}}


def ask(path: str, body: dict[str, Any], template: str = TOOLS + TEMPLATE, **options: Any) -> httpx.Response:
    """One POST, over a real tokenizer."""

    async def go() -> httpx.Response:
        tokenizer = Tokenizer(byte_level_backend(), frozenset({0}), ChatTemplate(template, {}))
        info = replace(INFO, vocab_size=tokenizer.vocab_size)
        async with client_of(app_of(two_engines(), tokenizer=tokenizer, info=info, **options)) as client:
            return await client.post(path, json=body)

    return asyncio.run(go())


def told(path: str, body: dict[str, Any], **options: Any) -> Any:
    response = ask(path, body, **options)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("text", ["", "naïve 😀 text", "a\nb", "<|end|>" * 3, "x" * 20_000])
def test_a_text_and_back(text: str) -> None:
    answer = told("/tokenize", {"prompt": text, "add_special_tokens": False})
    assert set(answer) == {"count", "max_model_len", "tokens"}
    assert answer["count"] == len(answer["tokens"])
    assert told("/detokenize", {"tokens": answer["tokens"]}) == {"prompt": text}


def test_the_tokens_are_those_that_a_generation_takes() -> None:
    backend = byte_level_backend()
    answer = told("/tokenize", {"prompt": "a text", "model": "w8a8", "return_token_strings": True})
    assert answer["tokens"] == Tokenizer(backend, frozenset({0})).encode("a text")
    assert answer["max_model_len"] == two_engines()["w8a8"].max_model_len
    assert "".join(answer["token_strs"]).endswith("a text")
    assert len(answer["token_strs"]) == answer["count"]


def test_a_conversation() -> None:
    opened = told("/tokenize", {"messages": [USER]})
    closed = told("/tokenize", {"messages": [USER], "add_generation_prompt": False})
    assert opened["tokens"][: closed["count"]] == closed["tokens"]
    assert opened["count"] > closed["count"]
    with_tools = told("/tokenize", {"messages": [USER], "tools": [TOOL]})
    assert with_tools["count"] > opened["count"]
    assistant = {"role": "assistant", "content": "well"}
    body = {"messages": [USER, assistant], "add_generation_prompt": False}
    left_open = told("/tokenize", {**body, "continue_final_message": True})
    assert left_open["tokens"] == told("/tokenize", body)["tokens"][: left_open["count"]]
    text = told("/detokenize", {"tokens": left_open["tokens"]})["prompt"]
    assert text.endswith("well")


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        ("/tokenize", {}, 400, None, "send one of `prompt` and `messages`"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, 400, None, "send one of"),
        ("/tokenize", {"messages": []}, 400, "messages", "too few"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model", "nobody"),
        ("/tokenize", {"prompt": "a", "text": "b"}, 400, "text", "not a field"),
        ("/tokenize", {"prompt": 3}, 422, "prompt", "3"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, 400, "chat_template", "does not honour"),
        ("/tokenize", {"messages": [USER], "add_special_tokens": True}, 400, "add_special_tokens", "chat template"),
        ("/tokenize", {"messages": [USER], "continue_final_message": True}, 400, "continue_final_message", "'user'"),
        ("/detokenize", {}, 422, "tokens", "missing"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens", "at least 0"),
        ("/detokenize", {"tokens": [1 << 70]}, 400, "tokens", "outside the vocabulary"),
        ("/detokenize", {"tokens": ["a"]}, 422, "tokens", "'a'"),
    ],
)
def test_refusals(path: str, body: dict[str, Any], status: int, param: str | None, words: str) -> None:
    response = ask(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert words in error["message"]


def test_tools_without_a_template_that_knows_them() -> None:
    response = ask("/tokenize", {"messages": [USER], "tools": [TOOL]}, TEMPLATE)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


def test_a_template_that_does_not_end_is_cut_off() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    response = ask("/tokenize", {"messages": [USER]}, endless)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "MAX_TOKENS", 10)
    response = ask("/tokenize", {"prompt": "abc " * 40})
    assert response.status_code == 400
    assert "at most 10 are listed" in response.json()["error"]["message"]
    assert ask("/tokenize", {"prompt": "a" * 5000}, max_body_bytes=4096).status_code == 413
    response = ask("/detokenize", {"tokens": [1] * ((1 << 17) + 1)})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


def test_keys_and_limits() -> None:
    keys = {"api_keys": "anna:anna-key-1"}
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert ask(path, body, **keys).status_code == 401

    async def go() -> list[int]:
        async with client_of(app_of(two_engines(), max_requests_per_minute=2)) as client:
            return [(await client.post("/tokenize", json={"prompt": "a"})).status_code for _ in range(3)]

    assert asyncio.run(go()) == [200, 200, 429]
