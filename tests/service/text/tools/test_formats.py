"""Which format a chat template speaks, and a conversation's way through it and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.text.chat_template import ChatTemplate, read_template
from service.text.tokenizer import Tokenizer
from service.text.tools.calls import Arguments, Called
from service.text.tools.format import Format
from service.text.tools.formats import FORMATS, format_of
from service.text.tools.hermes import HERMES
from service.text.tools.llama import LLAMA
from service.text.tools.mistral import MISTRAL, MISTRAL_ARGS, adapted
from service.text.tools.parser import FreeParser
from tests.support.tokenizers import SPECIAL, TEMPLATE, byte_level_backend, save
from tests.support.tool_templates import HERMES_TEMPLATE, LLAMA_TEMPLATE, MISTRAL_ARGS_TEMPLATE, MISTRAL_TEMPLATE

Message = dict[str, Any]
TEMPLATES = [
    (HERMES_TEMPLATE, HERMES),
    (LLAMA_TEMPLATE, LLAMA),
    (MISTRAL_TEMPLATE, MISTRAL),
    (MISTRAL_ARGS_TEMPLATE, MISTRAL_ARGS),
]
TOOL = {"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": {"type": "object"}}}
ARGUMENTS = {"city": 'Köln "}', "days": [1, {"x": None}]}


@pytest.mark.parametrize(("template", "format_"), TEMPLATES)
def test_the_format_of_a_template(template: str, format_: Format) -> None:
    assert format_of(template) is format_


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        HERMES_TEMPLATE.replace("tools", "things"),
        HERMES_TEMPLATE + "<function=name>",
        HERMES_TEMPLATE + "<arg_key>",
        "{% if tools %}<|tool▁calls▁begin|>{% endif %}",
    ],
)
def test_templates_without_tools_or_in_other_formats_have_none(template: str) -> None:
    assert format_of(template) is None


@pytest.mark.parametrize(("source", "format_"), TEMPLATES)
@pytest.mark.parametrize("num_calls", [1, 2])
def test_a_call_that_a_template_writes_is_read_as_it_was(source: str, format_: Format, num_calls: int) -> None:
    """The text between the assistant's turn and the next is what the model was trained to write."""
    if num_calls == 2 and format_ is LLAMA:
        pytest.skip("its template refuses two calls in one message")
    template = ChatTemplate(source, {})
    ids = [format_.makes_id() for _ in range(num_calls)]
    calls = [{"id": id_, "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}} for id_ in ids]
    user: Message = {"role": "user", "content": "hello"}
    asked: list[Message] = [user, {"role": "assistant", "content": "", "tool_calls": calls}]
    prompt = template.render([user], tools=[TOOL])
    whole = template.render([*asked, {"role": "tool", "content": "sunny", "tool_call_id": ids[0]}], tools=[TOOL])
    assert '"description": "Does it."' in prompt
    assert "sunny" in whole
    assert whole.startswith(prompt.rstrip())
    answer = whole[len(prompt.rstrip()) :]
    answer = min((answer.partition(end)[0] for end in ("<|im_end|>", "<|eot_id|>", "</s>")), key=len).strip()
    parser = FreeParser(format_, {"f"})
    found = [*parser.push(answer), *parser.flush()]
    assert [event for event in found if isinstance(event, Called)] == [Called(n, "f") for n in range(num_calls)]
    assert [json.loads(event.text) for event in found if isinstance(event, Arguments)] == [ARGUMENTS] * num_calls
    assert len(found) == 2 * num_calls


def test_an_assistant_that_calls_is_answered_and_not_continued() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages: list[Message] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert ChatTemplate(HERMES_TEMPLATE, {}).render(messages).endswith("<|im_start|>assistant\n")


def test_ids() -> None:
    assert len({format_.makes_id() for format_ in FORMATS for _ in range(50)}) == 50 * len(FORMATS)
    for id_ in ("call_0123456789abcdef", "", "ä" * 9, "chatcmpl-tool-1"):
        assert len(adapted(id_)) == 9
        assert adapted(id_).isalnum()
        assert adapted(id_).isascii()
        assert adapted(id_) == adapted(id_)
        assert HERMES.adapts_id(id_) == LLAMA.adapts_id(id_) == id_
    assert adapted("call_1") != adapted("call_2")
    assert adapted("aB3dE6gH9") == "aB3dE6gH9"
    assert adapted(MISTRAL.makes_id()).isalnum()


TWO = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": HERMES_TEMPLATE}]


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_template_of_its_own_for_tools(is_listed: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level_backend(), template="plain")
    if is_listed:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TWO}))
    else:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(HERMES_TEMPLATE)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.tool_format is HERMES
    user = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat(user) == tokenizer.encode("plain")[1:]
    decoder = tokenizer.detokenizer()
    text = "".join(map(decoder.push, tokenizer.apply_chat(user, tools=[TOOL]))) + decoder.flush()
    assert "<tools>" in text
    assert read_template(folder, "rag") is None


def test_special_tokens_are_text_where_they_are_shown() -> None:
    tokenizer = Tokenizer(byte_level_backend(), frozenset({0}))
    ids = [*tokenizer.encode("hello")[1:], 3, *tokenizer.encode(" é")[1:], 4, 0]

    def text(*shown: str) -> str:
        decoder = tokenizer.detokenizer((), shown)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    assert text() == text("nothing") == "hello é"
    assert text("<|user|>") == "hello<|user|> é"
    assert text(*SPECIAL) == "hello<|user|> é<|assistant|><|end|>"
    assert set(tokenizer.special_ids) == set(SPECIAL)
