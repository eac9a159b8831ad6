"""OpenAI's own client against the routes: prompts, choices, log-probabilities, chats."""

import pytest

from tests.support.narrowed import present
from tests.support.openai_client import TEXT, USER, ask, chat, complete


def test_a_completion_has_every_field() -> None:
    answer, engine = complete()
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("text_completion", "fake:w8a8")
    assert answer.id.startswith("cmpl-")
    assert present(answer.system_fingerprint).startswith("fp_")
    assert answer.created > 1_700_000_000
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, TEXT, "stop", None)
    num_tokens = len(TEXT.encode()) + 1
    assert (present(answer.usage).prompt_tokens, present(answer.usage).completion_tokens) == (1, num_tokens)
    assert present(answer.usage).total_tokens == 1 + num_tokens
    assert present(present(answer.usage).prompt_tokens_details).cached_tokens == 0
    assert present(choice.model_extra)["metrics"]["generated_tokens"] == num_tokens
    assert engine.submitted[0].params.temperature == 1


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hé", [list("hé".encode())]),
        (["ab", "c"], [[97, 98], [99]]),
        ([1, 255], [[1, 255]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_each_form_of_prompt_reaches_the_engine(
    prompt: list[int] | list[list[int]] | list[str] | str, ids: list[list[int]]
) -> None:
    answer, engine = complete(prompt=prompt)
    assert [request.prompt_ids for request in engine.submitted] == ids
    assert [choice.index for choice in answer.choices] == list(range(len(ids)))
    assert present(answer.usage).prompt_tokens == sum(map(len, ids))


def test_choices_differ_by_seed_and_share_their_prompt() -> None:
    answer, engine = complete(
        {"reply": lambda ids, params: f"{bytes(ids).decode()}{params.seed}"}, prompt=["p", "q"], n=3, seed=7
    )
    assert [choice.text for choice in answer.choices] == ["p7", "p8", "p9", "q7", "q8", "q9"]
    assert present(answer.usage).prompt_tokens == 2
    assert present(answer.usage).completion_tokens == 18
    assert len({request.id for request in engine.submitted}) == 6
    assert all(request.id.startswith(answer.id) for request in engine.submitted)


def test_without_a_seed_each_choice_draws_its_own() -> None:
    _, engine = complete(n=3)
    assert [request.params.seed for request in engine.submitted] == [None] * 3


def test_the_last_seed_wraps_round() -> None:
    _, engine = complete(n=2, seed=(1 << 63) - 1)
    assert [request.params.seed for request in engine.submitted] == [(1 << 63) - 1, 0]


def test_stop_strings() -> None:
    answer, _ = complete({"reply": "one END two"}, stop=["zzz", " END"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one", "stop")
    said, _ = chat({"reply": "one END two"}, stop=" END")
    assert (said.choices[0].message.content, said.choices[0].finish_reason) == ("one", "stop")


def test_length() -> None:
    answer, _ = complete(max_tokens=2)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("na", "length")


def test_default_lengths() -> None:
    _, engine = ask(lambda client: client.completions.create(model="fake", prompt="a"))
    assert engine.submitted[0].params.max_tokens == 16
    _, engine = ask(lambda client: client.completions.create(model="fake", prompt="a" * 60))
    assert engine.submitted[0].params.max_tokens == 4
    _, engine = chat()
    assert engine.submitted[0].params.max_tokens == 64 - len("user:x\n")


def test_extensions_reach_the_engine() -> None:
    wanted = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "priority": 7, "ignore_eos": True}
    for answer, engine in (complete(extra_body=wanted, top_p=0.5), chat(extra_body=wanted, top_p=0.5, max_tokens=20)):
        params = engine.submitted[0].params
        assert {name: getattr(params, name) for name in wanted} == wanted
        assert params.top_p == 0.5
        assert answer.choices[0].finish_reason == "length"


def test_logprobs_of_a_completion() -> None:
    answer, _ = complete({"reply": "aé"}, logprobs=1)
    shown = present(answer.choices[0].logprobs)
    assert shown.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "<eos>"]
    assert shown.token_logprobs == [-0.5] * 4
    assert shown.text_offset == [0, 1, 1, 2]
    assert shown.top_logprobs == [{token: -0.5} for token in present(shown.tokens)]


def test_the_token_itself_is_among_the_likeliest() -> None:
    """OpenAI: up to logprobs + 1 entries."""
    answer, _ = complete({"reply": "a", "logprob": -3.0}, logprobs=0)
    assert present(answer.choices[0].logprobs).top_logprobs == [{"a": -3.0}, {"<eos>": -3.0}]


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("prompt", ["abc", list(b"abc")])
def test_echo_scores_the_prompt(max_tokens: int, prompt: str | list[int]) -> None:
    answer, engine = complete({"reply": "xyz"}, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens)
    (choice,) = answer.choices
    shown = present(choice.logprobs)
    assert choice.text == "abc" + "x" * max_tokens
    assert choice.finish_reason == "length"
    assert shown.tokens == [*"abc", *"x" * max_tokens]
    assert shown.token_logprobs == [None, -0.25, -0.5, *[-0.5] * max_tokens]
    assert shown.text_offset == [0, 1, 2, 3][: 3 + max_tokens]
    assert present(shown.top_logprobs)[:3] == [None, {"a": -0.24, "b": -0.25}, {"b": -0.49, "c": -0.5}]
    assert present(answer.usage).completion_tokens == max_tokens
    assert (engine.submitted[0].params.max_tokens, engine.submitted[0].params.prompt_logprobs) == (1, 1)


def test_prompt_logprobs_are_computed_for_echo_alone() -> None:
    _, engine = complete(logprobs=1)
    assert engine.submitted[0].params.prompt_logprobs is None
    _, engine = complete(echo=True)
    assert engine.submitted[0].params.prompt_logprobs is None


def test_the_sums_of_lm_eval() -> None:
    """Its local-completions sums token_logprobs[context:-1] and compares each with the largest of top_logprobs."""
    answer, _ = complete(prompt=[[97, 98, 99, 100], [97, 98, 99]], echo=True, logprobs=1, max_tokens=1, temperature=0)
    for choice, num_context, total in zip(answer.choices, (2, 1), (-0.5 - 0.75, -0.25 - 0.5), strict=True):
        shown = present(choice.logprobs)
        assert sum(present(shown.token_logprobs)[num_context:-1]) == total
        greedy = [
            logprob == max(top.values())
            for logprob, top in zip(
                present(shown.token_logprobs)[num_context:-1], present(shown.top_logprobs)[num_context:-1], strict=True
            )
        ]
        assert greedy == [False] * len(greedy)


def test_a_chat_has_every_field() -> None:
    answer, engine = chat()
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("chat.completion", "fake:w8a8")
    assert answer.id.startswith("chatcmpl-")
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert present(answer.usage).prompt_tokens == len("user:x\n")
    assert present(choice.model_extra)["metrics"]["prompt_tokens"] == len("user:x\n")
    assert bytes(engine.submitted[0].prompt_ids) == b"user:x\n"


def test_messages_reach_the_template() -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    _, engine = chat(messages=messages)
    assert bytes(engine.submitted[0].prompt_ids) == b"developer:be\nuser:x\ny\n"


def test_an_assistants_last_message_is_continued() -> None:
    messages = [*USER, {"role": "assistant", "content": "I am"}]
    _, engine = chat(messages=messages)
    assert bytes(engine.submitted[0].prompt_ids) == b"user:x\nassistant:I am"
    _, engine = chat(messages=messages, extra_body={"add_generation_prompt": False})
    assert bytes(engine.submitted[0].prompt_ids) == b"user:x\nassistant:I am\n"


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer, _ = chat()
    messages = [*USER, answer.choices[0].message.model_dump(), *USER]
    _, engine = chat(messages=messages, max_tokens=5)
    assert bytes(engine.submitted[0].prompt_ids).decode() == f"user:x\nassistant:{TEXT}\nuser:x\n"


def test_logprobs_of_a_chat() -> None:
    answer, _ = chat({"reply": "é"}, logprobs=True, top_logprobs=2)
    first, second, end = present(present(answer.choices[0].logprobs).content)
    assert (first.token, first.bytes, first.logprob) == ("bytes:\\xc3", [0xC3], -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("bytes:\\xc3", -0.5), ("bytes:\\xc4", -1.5)]
    assert second.bytes == [0xA9]
    assert end.token == "<eos>"
    answer, _ = chat({"reply": "é"}, logprobs=True)
    assert present(present(answer.choices[0].logprobs).content)[0].top_logprobs == []
