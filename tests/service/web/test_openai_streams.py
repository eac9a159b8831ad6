"""OpenAI's own client against the routes: streams, model names, failures, and clients that leave."""

import asyncio
from itertools import accumulate
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from service.engine.api import FinishReason
from tests.service.kinds import Samples
from tests.support.fake_engine import FakeEngine
from tests.support.harness import app_of, client_of, engines_of, events_of, metrics_of, server_of, two_engines, until
from tests.support.openai_client import TEXT, USER, ask, complete, openai_of, stream

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_a_stream_of_text_adds_up(n: int, tokens_per_step: int) -> None:
    async def work(client: openai.AsyncOpenAI) -> list[Any]:
        chunks = await client.completions.create(
            model="fake",
            prompt="a",
            n=n,
            max_tokens=32,
            stream=True,
            logprobs=1,
            stream_options={"include_usage": True},
        )
        return [chunk async for chunk in chunks]

    (*chunks, last), _ = ask(work, reply=TEXT, tokens_per_step=tokens_per_step)
    data = TEXT.encode()
    expected = [len(data[:length].decode(errors="ignore")) for length in range(len(data) + 1)]
    assert {chunk.id for chunk in chunks} == {last.id}
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    for index in range(n):
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(piece.text for piece in pieces) == TEXT
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
        assert pieces[-1].metrics["generated_tokens"] == len(TEXT.encode()) + 1
        assert sum(len(piece.logprobs.tokens) for piece in pieces) == len(TEXT.encode()) + 1
        offsets = [offset for piece in pieces for offset in piece.logprobs.text_offset]
        assert offsets == expected
    assert last.choices == []
    assert last.usage.completion_tokens == n * (len(TEXT.encode()) + 1)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_of_chat_adds_up(n: int) -> None:
    *chunks, last = stream(
        "chat",
        messages=USER,
        n=n,
        logprobs=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    for index in range(n):
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(piece.delta.content for piece in pieces) == TEXT
        assert [piece.delta.role for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
        text = b"".join(bytes(entry.bytes) for piece in pieces for entry in piece.logprobs.content)
        assert text == TEXT.encode() + b"<eos>"
    counts = [chunk.usage.completion_tokens for chunk in (*chunks, last)]
    sizes = [len(chunk.choices[0].logprobs.content) for chunk in chunks]
    assert counts == [*accumulate(sizes), sum(sizes)]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_without_usage_ends_with_the_finish_reason() -> None:
    assert stream("chat", messages=USER)[-1].choices[0].finish_reason == "stop"
    assert stream("text", prompt="a", max_tokens=3)[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": USER})]
)
@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}, {"stream_options": None}])
def test_every_stream_has_usage_where_the_operator_wants_it(
    path: str, body: dict[str, Any], options: dict[str, Any]
) -> None:
    async def last(**settings: Any) -> dict[str, Any]:
        async with client_of(app_of(two_engines(reply="ab"), **settings)) as client:
            response = await client.post(path, json={**body, **options, "max_tokens": 9, "stream": True})
            return events_of(response)[-1]

    with_usage, without = asyncio.run(last(always_usage=True)), asyncio.run(last())
    assert (with_usage["choices"], with_usage["usage"]["completion_tokens"]) == ([], 3)
    assert "usage" not in without
    assert without["choices"][0]["finish_reason"] == "stop"


def test_a_streamed_echo_begins_with_the_prompt() -> None:
    first, *rest = stream("text", prompt="abc", echo=True, logprobs=0, max_tokens=3)
    assert first.choices[0].text.startswith("abcn")
    assert first.choices[0].logprobs.tokens[:4] == [*"abcn"]
    offsets = [place for chunk in (first, *rest) for place in chunk.choices[0].logprobs.text_offset]
    assert offsets == [0, 1, 2, 3, 4, 5]
    (only,) = stream("text", prompt="abc", echo=True, max_tokens=0)
    assert (only.choices[0].text, only.choices[0].finish_reason) == ("abc", "length")


@pytest.mark.parametrize(
    ("name", "variant"), [("fake", "w8a8"), ("w8a8", "w8a8"), ("fp16", "fp16"), ("fake:fp16", "fp16")]
)
def test_model_names(name: str, variant: str) -> None:
    async def work(client: openai.AsyncOpenAI) -> tuple[Completion, Any]:
        return await client.completions.create(model=name, prompt="a"), await client.models.retrieve(name)

    answer, served = ask(work)[0]
    assert answer.model == f"fake:{variant}"
    assert (served.id, served.object, served.variant) == (name, "model", variant)
    assert served.max_model_len == served.context_length == 64


def test_listed_models() -> None:
    listed = ask(lambda client: client.models.list())[0].data
    assert [model.id for model in listed] == ["fake", "fake:w8a8", "fake:fp16"]
    assert {model.owned_by for model in listed} == {"ottava"}


def test_fingerprints_tell_variants_apart_and_repeat() -> None:
    prints = [complete(model=name)[0].system_fingerprint for name in ("fake", "w8a8", "fp16")]
    assert prints[0] == prints[1] != prints[2]


def test_errors_are_the_clients_own() -> None:
    async def work(client: openai.AsyncOpenAI) -> tuple[openai.NotFoundError, openai.BadRequestError]:
        with pytest.raises(openai.NotFoundError, match="use one of: fake, fake:w8a8, fake:fp16") as unknown:
            await client.completions.create(model="fake:int4", prompt="a")
        with pytest.raises(openai.BadRequestError, match=r"`tool_choice` is 'sometimes'") as refused:
            await client.chat.completions.create(model="fake", messages=MESSAGES, tool_choice="sometimes")  # type: ignore[call-overload]  # no choice
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("no/such")
        return unknown.value, refused.value

    unknown, refused = ask(work)[0]
    assert (unknown.code, unknown.param) == ("model_not_found", "model")
    assert refused.param == "tool_choice"


def test_an_engines_failure_reaches_the_stream() -> None:
    async def work(client: openai.AsyncOpenAI) -> None:
        chunks = await client.completions.create(model="fake", prompt="a", n=2, stream=True)
        with pytest.raises(openai.APIError, match="engine"):
            async for _ in chunks:
                pass

    _, engine = ask(work, reply="abcdef", fail_at=3)
    assert not engine.active


def test_over_a_socket() -> None:
    async def go() -> tuple[ChatCompletion, list[Any]]:
        engines = two_engines(reply=TEXT)
        async with (
            server_of(app_of(engines)) as port,
            openai.AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client,
        ):
            answer = await client.chat.completions.create(model="fake", messages=MESSAGES)
            chunks = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True, n=2)
            pieces = [chunk.choices[0] async for chunk in chunks]
        return answer, pieces

    answer, pieces = asyncio.run(go())
    assert answer.choices[0].message.content == TEXT
    for index in range(2):
        assert "".join(piece.delta.content for piece in pieces if piece.index == index) == TEXT


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_frees_all_its_choices(is_stream: bool) -> None:
    async def go() -> FakeEngine:
        engines = two_engines(delay_s=0.02)
        app = app_of(engines)
        async with server_of(app) as port:
            client = openai.AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)
            body: dict[str, Any] = {
                "model": "fake",
                "prompt": ["a", "b"],
                "n": 2,
                "max_tokens": 60,
                "extra_body": {"ignore_eos": True},
            }
            if is_stream:
                async for _ in await client.completions.create(**body, stream=True):
                    break
            else:
                with pytest.raises(openai.APITimeoutError):
                    await client.completions.create(**body, timeout=0.2)
            await client.close()
            await until(lambda: len(engines["w8a8"].freed) == 4)
            await until(lambda: app.state.serving.traffic.num_active == 0)
        return engines["w8a8"]

    engine = asyncio.run(go())
    assert [request.finish_reason for request in engine.freed] == [FinishReason.ABORT] * 4


def test_a_queue_that_fills_up_half_way_holds_nothing() -> None:
    async def go() -> tuple[Samples, int]:
        engines = engines_of(FakeEngine("w8a8", max_waiting=2, delay_s=0.01))
        app = app_of(engines)
        async with openai_of(app) as client:
            with pytest.raises(openai.InternalServerError, match="waiting"):
                await client.completions.create(model="fake", prompt="a", n=3)
            await until(lambda: not engines["w8a8"].active)
            http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
            async with http:
                return await metrics_of(http), app.state.serving.traffic.num_active

    samples, num_active = asyncio.run(go())
    assert num_active == 0
    assert samples["ottava_requests_total", "outcome=rejected", "variant=w8a8"] == 1
    assert samples["ottava_requests_total", "outcome=abort", "variant=w8a8"] == 2
