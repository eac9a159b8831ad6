"""Tokens that go out together say what they would one by one, and an event that is filled in what pydantic says."""

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.api import FinishReason, SamplingParams, Token
from service.engine.messages import Submit
from service.engine.stream import MAX_TOGETHER, RequestStream
from service.web.generation.sse import MARK, Form, event
from service.web.openai.answers import ChatChunkChoice, ChatCompletionChunk, ChatDelta, Completion, CompletionChoice
from service.web.openai.choices import Reply
from service.web.parsing import QuickConnection
from service.web.schemas.generate import Delta
from tests.service.kinds import Samples
from tests.support.harness import app_of, client_of, events_of, metrics_of, two_engines

HEAD: dict[str, Any] = {"id": "cmpl-1", "created": 7, "model": "50 %b:w8a8", "system_fingerprint": "fp"}
REPLY = 'naïve 😀 100 % "end" of it'


def stream_of() -> tuple[RequestStream, list[FinishReason]]:
    """A stream on the running event loop, and what its engine is told."""
    told: list[FinishReason] = []
    command = Submit("w8a8", 1, 1, "r", [1], SamplingParams(), 0.0, 0)
    return RequestStream(command, lambda _, reason: told.append(reason), asyncio.get_running_loop()), told


def tokens_of(*ids: int) -> list[Token]:
    return [Token(id_, 0.0) for id_ in ids]


def add(stream: RequestStream, *ids: int) -> None:
    """Tokens of one step each, of three requests."""
    for token in tokens_of(*ids):
        stream.add(token, 3)


def test_a_stream_gives_what_has_come_meanwhile_at_once_and_then_its_end() -> None:
    async def go() -> None:
        stream, _ = stream_of()
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        add(stream, 1)
        assert await first == tokens_of(1)
        add(stream, 2, 3)
        stream.end(None)
        assert [tokens async for tokens in stream] == [tokens_of(2, 3)]

    asyncio.run(go())


def test_an_error_comes_behind_the_tokens_before_it() -> None:
    async def go() -> None:
        stream, _ = stream_of()
        add(stream, 1)
        for error in (ValueError("a step"), None):
            stream.end(error)
        assert await anext(stream) == tokens_of(1)
        with pytest.raises(ValueError, match="a step"):
            await anext(stream)

    asyncio.run(go())


def test_no_part_of_what_has_piled_up_is_too_long() -> None:
    async def go() -> list[Sequence[Token]]:
        stream, _ = stream_of()
        for number in range(2 * MAX_TOGETHER + 1):
            add(stream, number)
        stream.end(None)
        return [tokens async for tokens in stream]

    parts = asyncio.run(go())
    assert [len(part) for part in parts] == [MAX_TOGETHER, MAX_TOGETHER, 1]
    assert [token.id for part in parts for token in part] == list(range(2 * MAX_TOGETHER + 1))


@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_stream_that_is_finished_gives_nothing_more(is_waiting: bool) -> None:
    async def go() -> None:
        stream, told = stream_of()
        reading = asyncio.ensure_future(anext(stream, None))
        if is_waiting:
            await asyncio.sleep(0)
        else:
            add(stream, 1)
        stream.finish(FinishReason.STOP)
        stream.finish(FinishReason.ABORT)
        add(stream, 2)
        assert await reading is None
        assert told == [FinishReason.STOP]

    asyncio.run(go())


ROUTES: dict[str, dict[str, object]] = {
    "/generate": {"prompt": "a"},
    "/v1/completions": {"model": "fake", "prompt": "a"},
    "/v1/chat/completions": {"model": "fake", "messages": [{"role": "user", "content": "a"}]},
}
LOGPROBS: dict[str, dict[str, object]] = {"/generate": {"logprobs": 2}, "/v1/completions": {"logprobs": 2}}
LOGPROBS["/v1/chat/completions"] = {"logprobs": True, "top_logprobs": 2}
ENDS: dict[str, dict[str, object]] = {"end": {}, "length": {"max_tokens": 11}, "stop": {"stop": "0 %"}}


def streamed(path: str, tokens_per_step: int, **body: object) -> tuple[list[dict[str, Any]], Samples]:
    """The events of a stream, and the metrics of its server."""

    async def go() -> tuple[list[dict[str, Any]], Samples]:
        app = app_of(two_engines(reply=REPLY, tokens_per_step=tokens_per_step))
        async with client_of(app) as client:
            response = await client.post(path, json={"max_tokens": 40, **ROUTES[path], **body, "stream": True})
            return events_of(response), await metrics_of(client)

    return asyncio.run(go())


def said(events: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the events of a stream say together, without what is of one run alone."""
    if "token_ids" in events[0]:
        *deltas, last = events
        assert "".join(delta["text"] for delta in deltas) == last["text"]
        assert [id_ for delta in deltas for id_ in delta["token_ids"]] == last["token_ids"]
        assert [entry for delta in deltas for entry in delta.get("logprobs", [])] == last.get("logprobs", [])
        return {name: last.get(name) for name in ("text", "token_ids", "logprobs", "finish_reason", "usage")}
    choices = [choice for each in events for choice in each["choices"]]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    return {
        "text": "".join(choice["text"] if "text" in choice else choice["delta"]["content"] for choice in choices),
        "logprobs": {name: [x for each in logprobs for x in each[name]] for name in (logprobs[0] if logprobs else ())},
        "ends": [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None],
        "num_tokens": choices[-1]["metrics"]["generated_tokens"],
    }


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("shows", [False, True], ids=["plain", "logprobs"])
def test_the_same_is_said_however_the_tokens_come(path: str, end: str, shows: bool) -> None:
    body = ENDS[end] | (LOGPROBS[path] if shows else {})
    one_by_one, _ = streamed(path, 1, **body)
    for tokens_per_step in (2, 3, 7, 50):
        events, samples = streamed(path, tokens_per_step, **body)
        assert len(events) < len(one_by_one)
        assert said(events) == said(one_by_one)
        num_tokens = samples["ottava_generation_tokens_total", "variant=w8a8"]
        assert samples["ottava_inter_token_latency_seconds_count", "variant=w8a8"] == num_tokens - 1


def test_tokens_of_one_event_have_no_time_between_them() -> None:
    events, samples = streamed("/generate", 50)
    assert events[-1]["metrics"]["itl_ms"] == {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    assert samples["ottava_inter_token_latency_seconds_sum", "variant=w8a8"] == 0.0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("more", [{}, {"n": 2}, {"stream_options": {"include_usage": True}}], ids=["", "n", "usage"])
def test_a_stream_of_filled_in_events_is_that_of_built_ones(
    path: str, more: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def events() -> list[dict[str, Any]]:
        # What is of one request alone; in which order two answers come is the event loop's to say.
        own = ("id", "created")
        plain = [{k: v for k, v in each.items() if k not in own} for each in streamed(path, 1, **more)[0]]
        plain.sort(key=lambda each: each["choices"][0]["index"] if each["choices"] else math.inf)
        for choice in (choice for each in plain for choice in each["choices"]):
            choice.pop("metrics", None)
        return plain

    filled_in = events()
    monkeypatch.setattr(Reply, "_form_of", lambda *_: None)
    assert filled_in == events()


def completion(text: str) -> Completion:
    choice = CompletionChoice(index=1, text=text, logprobs=None, finish_reason=None)
    return Completion(**HEAD, object="text_completion", choices=[choice], usage=None)


def chunk(text: str) -> ChatCompletionChunk:
    choice = ChatChunkChoice(index=0, delta=ChatDelta(content=text), logprobs=None, finish_reason=None)
    return ChatCompletionChunk(**HEAD, object="chat.completion.chunk", choices=[choice])


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.integers(0, 200_000), max_size=4))
def test_an_event_that_is_filled_in_is_the_models_json(text: str, ids: list[int]) -> None:
    for model in (completion, chunk):
        assert Form(model(MARK), MARK).event(text) == event(model(text))
    form = Form(Delta(id="%", variant="%s", text=MARK, token_ids=[-1]), MARK, [-1])
    assert form.event(text, ids) == event(Delta(id="%", variant="%s", text=text, token_ids=ids))


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e", "\r", "\n"])
def test_no_event_holds_a_line_end_of_unicode(char: str) -> None:
    text = f"a{char}b\\{char}"
    filled_in = Form(Delta(id="1", variant=char, text=MARK, token_ids=[-1]), MARK, [-1]).event(text, [7])
    for said in (filled_in, event(Delta(id="1", variant=char, text=text, token_ids=[7]))):
        line, *rest = said.decode().splitlines()
        assert (line + "\n\n", rest) == (said.decode(), [""])
        assert json.loads(line.removeprefix("data: ")) == {"id": "1", "variant": char, "text": text, "token_ids": [7]}


def test_a_mark_that_is_not_there_once_is_refused() -> None:
    with pytest.raises(ValueError, match="not there exactly once"):
        Form(completion("text"), MARK)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("headers", [[], [(b"content-length", b"6")]], ids=["chunked", "length"])
def test_a_response_is_framed_as_h11_frames_it(method: str, version: str, headers: list[tuple[bytes, bytes]]) -> None:
    def sent(conn: h11.Connection) -> list[bytes | None]:
        conn.receive_data(f"{method} / HTTP/{version}\r\nhost: a\r\n\r\n".encode())
        while type(conn.next_event()) is not h11.EndOfMessage:
            pass
        bodies = [b"", b""] if method == "HEAD" else [b"data", b"", b"\r\n"]
        events = [h11.Response(status_code=200, headers=headers), *(h11.Data(data=body) for body in bodies)]
        parts = [conn.send(each) for each in (*events, h11.EndOfMessage())]
        with pytest.raises(h11.LocalProtocolError):
            conn.send(h11.Data(data=b"late"))
        return parts

    assert sent(QuickConnection(h11.SERVER)) == sent(h11.Connection(h11.SERVER))


def test_a_connection_that_stays_open_frames_each_response_by_its_own_head() -> None:
    conn = QuickConnection(h11.SERVER)
    parts = []
    for headers in ([], [(b"content-length", b"4")]):
        conn.receive_data(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        while type(conn.next_event()) is not h11.EndOfMessage:
            pass
        conn.send(h11.Response(status_code=200, headers=headers))
        parts.append(conn.send(h11.Data(data=b"null")))
        conn.send(h11.EndOfMessage())
        conn.start_next_cycle()
    assert parts == [b"4\r\nnull\r\n", b"null"]
