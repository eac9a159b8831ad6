"""What is sent, and how each route says it."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest

from service.errors import InvalidSettings
from service.tools.bench.dialects import ROUTES
from service.tools.bench.prompts import (
    Ids,
    Lengths,
    Prefixes,
    Prompt,
    Words,
    dataset_prompts,
    prefix_prompts,
    random_prompts,
    read_dataset,
)


def test_random_prompts_have_the_lengths_asked_for() -> None:
    prompts = list(islice(random_prompts(Ids(5, 9), Lengths(20, 8, 0.5), Random(0)), 200))
    lengths = {len(prompt.ids) for prompt in prompts}
    assert (min(lengths), max(lengths)) == (10, 30)
    assert {prompt.max_tokens for prompt in prompts} == set(range(4, 13))
    assert {id_ for prompt in prompts for id_ in prompt.ids} == set(range(5, 10))
    exact = list(islice(random_prompts(Ids(5, 9), Lengths(20, 8), Random(0)), 5))
    assert {(len(prompt.ids), prompt.max_tokens) for prompt in exact} == {(20, 8)}


def test_words_make_about_the_tokens_asked_for() -> None:
    made = Words(tokens_per_word=1.25, overhead_tokens=30).make(130, Random(0))
    assert len(made.split()) == 80
    assert len(Words(1.0, 50).make(10, Random(0)).split()) == 1


def test_conversations_share_their_prefix_and_repeat_what_was_said() -> None:
    prompts = list(islice(prefix_prompts(Ids(1, 1000), Lengths(4, 3), Prefixes(2, 50, 3), Random(0)), 12))
    for prefix in (0, 1):
        turns = prompts[prefix:6:2]
        assert [len(turn.ids) for turn in turns] == [54, 61, 68]  # 50 + 4, and 3 + 4 more each turn
        for earlier, later in pairwise(turns):
            assert later.ids[: len(earlier.ids)] == earlier.ids
        another = prompts[6 + prefix]
        assert another.ids[:50] == turns[0].ids[:50]
        assert another.ids[50:] != turns[0].ids[50:]
    assert prompts[0].ids[:50] != prompts[1].ids[:50]


def test_conversations_in_words_are_messages() -> None:
    third = list(islice(prefix_prompts(Words(), Lengths(4, 3), Prefixes(1, 6, 3), Random(0)), 3))[2]
    assert [turn["role"] for turn in third.messages] == ["system", "user", "assistant", "user", "assistant", "user"]


IDS = Prompt((("system", [1, 2]), ("user", [3])), 4, is_conversation=True)
TALK = Prompt((("system", "a"), ("user", "b")), 4, is_conversation=True)
TEXT = Prompt((("user", "b"),), 4)
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def test_bodies() -> None:
    completions, chat, generate = (ROUTES[name] for name in ("completions", "chat", "generate"))
    assert completions.body(IDS, "m") == {"model": "m", "prompt": [1, 2, 3], **STREAMED}
    assert completions.body(TALK, "m")["prompt"] == "a\nb"
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert chat.body(TALK, "m") == {"model": "m", "messages": messages, **STREAMED}
    assert generate.body(IDS, "w8a8") == {"prompt_ids": [1, 2, 3], "stream": True, "variant": "w8a8"}
    assert generate.body(TALK, None) == {"messages": messages, "stream": True}
    assert generate.body(TEXT, None) == {"prompt": "b", "stream": True}


@pytest.mark.parametrize(
    ("event", "num_tokens"),
    [
        (b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}', 0),
        (b'{"choices": [{"delta": {"role": "assistant", "content": "Hi"}}]}', 1),
        (b'{"choices": [{"delta": {"content": ""}, "finish_reason": null}]}', 1),
        (b'{"choices": [{"delta": {"content": ""}, "finish_reason": "stop"}]}', 0),
        (b'{"choices": [{"delta": {}, "finish_reason": "length"}]}', 0),
        (b'{"choices": [{"delta": {"content": "!"}, "finish_reason": "length"}]}', 1),
        (b'{"choices": [{"delta": {"reasoning_content": "Hm"}}]}', 1),
        (b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "more": 3}}', 0),
    ],
)
def test_which_events_of_a_chat_bring_a_token(event: bytes, num_tokens: int) -> None:
    assert ROUTES["chat"].read(event).num_tokens == num_tokens


@pytest.mark.parametrize(
    ("event", "num_tokens"),
    [
        (b'{"choices": [{"text": "", "finish_reason": null}]}', 1),
        (b'{"choices": [{"text": "a", "finish_reason": "stop"}]}', 1),
        (b'{"choices": [{"text": "", "finish_reason": "length"}]}', 0),
        (b'{"choices": []}', 0),
    ],
)
def test_which_events_of_a_completion_bring_a_token(event: bytes, num_tokens: int) -> None:
    assert ROUTES["completions"].read(event).num_tokens == num_tokens


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize(
    ("details", "cached"),
    [
        ("", 0),
        (', "prompt_tokens_details": null', 0),
        (', "prompt_tokens_details": {}', 0),
        (', "prompt_tokens_details": {"cached_tokens": 5}', 5),
    ],
)
def test_usage_tells_what_was_in_the_prefix_cache(route: str, details: str, cached: int) -> None:
    event = f'{{"choices": [], "usage": {{"prompt_tokens": 7, "completion_tokens": 2{details}}}}}'
    assert ROUTES[route].read(event.encode()).usage == (7, cached, 2)


def test_a_dataset(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(
        '{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "b"}], "max_tokens": 9}\n', encoding="utf-8"
    )
    lines = read_dataset(file, 32)
    assert [(line.text, line.max_tokens, line.is_conversation) for line in lines] == [("a", 32, False), ("b", 9, True)]
    assert [line.text for line in islice(dataset_prompts(lines), 5)] == ["a", "b", "a", "b", "a"]


@pytest.mark.parametrize("line", ["{", "3", '{"text": "a"}', '{"messages": []}', '{"prompt": "a", "max_tokens": 0}'])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InvalidSettings, match=r"lines\.jsonl, line 2"):
        read_dataset(file, 32)


def test_an_empty_dataset(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(InvalidSettings, match="has no line"):
        read_dataset(file, 32)
