"""Rates, concurrency, queues, deadlines, sizes: what is refused, when one may come again, and what is freed."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from service.engine.api import EngineStats, SamplingParams
from service.engine.grammar import GivenUp, Grammar
from service.engine.messages import Submit
from service.engine.stream import RequestStream
from service.errors import InvalidRequest, QueueFull, RateLimited
from service.web.limits import MAX_RETRY_AFTER_S, KeyLimits, Pace, TokenBucket, whole_seconds
from service.web.openai.answers import CompletionLogprobs
from service.web.openai.logprobs import TextLogprobs
from service.web.schemas.generate import TokenLogprob
from tests.service.kinds import Samples
from tests.support.fake_engine import FakeEngine, FakeGrammars, FakeRequest
from tests.support.harness import (
    DEADLINE_S,
    app_of,
    client_of,
    engines_of,
    events_of,
    metrics_of,
    post,
    two_engines,
    until,
)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def stats(num_waiting: int, num_running: int) -> EngineStats:
    return EngineStats(num_running, num_waiting, 1, 1, 0, 0, 0, 0)


def test_a_bucket_gives_its_capacity_and_then_its_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(3, 0.5, clock)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 2]
    clock.now_s += 1.5
    assert bucket.take() == 0.5
    clock.now_s += 0.5
    assert bucket.take() == 0
    clock.now_s += 1000
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 2]


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 5), st.sampled_from([0.125, 0.25, 0.5, 1.0]))
def test_a_bucket_never_gives_more_than_capacity_and_rate(
    quarters: list[int], capacity: int, rate_per_s: float
) -> None:
    """Over any stretch of t seconds at most capacity + rate * t; and who waits as told is served."""
    clock = Clock()
    bucket = TokenBucket(capacity, rate_per_s, clock)
    taken = []
    for quarter in quarters:
        clock.now_s += quarter / 4
        wait_s = bucket.take()
        if wait_s:
            clock.now_s += wait_s
            assert bucket.take() == 0
        taken.append(clock.now_s)
    for i, start_s in enumerate(taken):
        for j in range(i, len(taken)):
            assert j - i + 1 <= capacity + rate_per_s * (taken[j] - start_s)


def test_each_key_has_its_own_rate_and_concurrency() -> None:
    clock = Clock()
    limits = KeyLimits(2, 6, clock)
    for _ in range(2):
        limits.enter("a")
    with pytest.raises(RateLimited, match="2 at a time"):
        limits.enter("a")
    limits.enter("b")
    for _ in range(2):
        limits.leave("a", 0.1)
    for _ in range(4):
        limits.enter("a")
        limits.leave("a", 0.1)
    with pytest.raises(RateLimited, match="6 requests per minute") as caught:
        limits.enter("a")
    assert caught.value.retry_after_s == 10
    clock.now_s += 10
    limits.enter("a")


def test_one_refused_for_concurrency_costs_no_rate() -> None:
    limits = KeyLimits(1, 2, Clock())
    limits.enter("a")
    for _ in range(5):
        with pytest.raises(RateLimited, match="at a time") as caught:
            limits.enter("a")
    assert caught.value.retry_after_s == 1
    limits.leave("a", 30.0)
    limits.enter("a")
    with pytest.raises(RateLimited, match="at a time") as caught:
        limits.enter("a")
    assert caught.value.retry_after_s == 30


def test_answers_count_and_not_requests() -> None:
    limits = KeyLimits(4, None)
    limits.enter("a")
    limits.widen("a", 3, "n")
    limits.enter("a")
    with pytest.raises(RateLimited, match="4 answers to this API key are running, and this request would add 1"):
        limits.widen("a", 2, "n")
    with pytest.raises(RateLimited):
        limits.enter("a")
    with pytest.raises(InvalidRequest, match="asks for 5 answers; the limit of an API key is 4") as caught:
        limits.widen("a", 5, "n")
    assert caught.value.param == "n"
    limits.leave("a", 1.0, 3)
    limits.widen("a", 4, "n")
    limits.leave("a", 1.0, 4)
    assert not limits._num_active


def test_no_limits_refuse_nothing() -> None:
    limits = KeyLimits(None, None)
    for _ in range(1000):
        limits.enter("a")


@pytest.mark.parametrize(
    ("num_waiting", "num_running", "run_s", "expected"),
    [(0, 1, 0.1, 1), (9, 1, 2.0, 20), (99, 8, 4.0, 50), (5, 0, 3.0, 18), (10**6, 1, 60.0, MAX_RETRY_AFTER_S)],
)
def test_retry_after_is_the_queue_times_the_pace(
    num_waiting: int, num_running: int, run_s: float, expected: int
) -> None:
    pace = Pace()
    assert pace.retry_after_s("w8a8", stats(num_waiting, num_running)) == 1
    pace.add("w8a8", run_s)
    pace.add("fp16", 500.0)
    assert pace.retry_after_s("w8a8", stats(num_waiting, num_running)) == expected


def test_the_pace_follows_recent_requests() -> None:
    pace = Pace()
    pace.add("w8a8", 1.0)
    for _ in range(100):
        pace.add("w8a8", 21.0)
    assert pace.retry_after_s("w8a8", stats(0, 1)) == 21


def test_whole_seconds_are_rounded_up_and_bounded() -> None:
    assert [whole_seconds(s) for s in (0, 0.01, 1, 1.01, 1e9)] == [1, 1, 1, 2, MAX_RETRY_AFTER_S]


def assert_refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return error


def test_a_rate_over_http() -> None:
    async def go() -> list[httpx.Response]:
        async with client_of(app_of(two_engines(), max_requests_per_minute=2)) as client:
            return [await client.post("/generate", json={"prompt": "a"}) for _ in range(3)] + [
                await client.get("/metrics")
            ]

    *served, refused, other = asyncio.run(go())
    assert [response.status_code for response in served] == [200, 200]
    assert_refused(refused, 429, "rate_limited")
    assert refused.headers["retry-after"] == "30"
    assert other.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_concurrency_over_http_is_freed_when_the_answer_has_gone_out(stream: bool) -> None:
    async def go() -> tuple[list[httpx.Response], list[httpx.Response], list[httpx.Response], dict[str, int]]:
        app = app_of(two_engines(delay_s=0.02), max_concurrent_per_key=2)
        async with client_of(app) as client:
            body = {"prompt": "a", "stream": stream}
            answers = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(5)))
            again = [await client.post("/generate", json=body) for _ in range(3)]
            invalid = [await client.post("/generate", json={"prompt": 1}) for _ in range(5)]
            return answers, again, invalid, app.state.serving.limits._num_active

    answers, again, invalid, active = asyncio.run(go())
    assert sorted(response.status_code for response in answers) == [200, 200, 429, 429, 429]
    assert_refused(next(r for r in answers if r.status_code == 429), 429, "rate_limited")
    assert [response.status_code for response in again] == [200] * 3
    assert [response.status_code for response in invalid] == [422] * 5
    assert not active


WIDE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a", "n": 3}),
    ("/v1/completions", {"prompt": ["a", "b", "c"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 3}),
    ("/generate", {"prompt": "a", "compare": True}),
]


@pytest.mark.parametrize(("path", "body"), WIDE)
def test_one_request_of_many_answers_counts_as_many(path: str, body: dict[str, Any]) -> None:
    async def go() -> tuple[list[int], dict[str, int]]:
        app = app_of(two_engines(delay_s=0.02), max_concurrent_per_key=4)
        async with client_of(app) as client:
            answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(3)))
            again = await client.post(path, json=body)
            return [response.status_code for response in (*answers, again)], app.state.serving.limits._num_active

    (*together, again), active = asyncio.run(go())
    assert sorted(together) == ([200, 200, 429] if path == "/generate" else [200, 429, 429])
    assert again == 200
    assert not active


def test_more_answers_than_a_key_may_ever_have_are_refused_for_good() -> None:
    async def go() -> list[httpx.Response]:
        async with client_of(app_of(two_engines(), max_concurrent_per_key=1)) as client:
            return [await client.post(path, json=body) for path, body in WIDE]

    for response, field in zip(asyncio.run(go()), ("n", "prompt", "n", "compare"), strict=True):
        assert assert_refused(response, 400, "invalid_value")["param"] == field


HI = [{"role": "user", "content": "hi"}]
DEAR: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/completions", {"prompt": [97] * 100, "n": 2, "echo": True, "logprobs": 4, "max_tokens": 0}, 2 * 101 * 5),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 4, "max_tokens": 60}, 4 * 60 * 5),
    ("/v1/chat/completions", {"messages": HI, "n": 11, "logprobs": True, "top_logprobs": 0, "max_tokens": 100}, 1100),
    ("/generate", {"prompt": "a", "logprobs": 20, "max_tokens": 50}, 50 * 21),
    ("/generate", {"prompt": "a", "logprobs": 4, "max_tokens": 101, "compare": True}, 2 * 101 * 5),
]


@pytest.mark.parametrize(("path", "body", "price"), DEAR)
def test_a_request_is_priced_before_it_is_admitted(path: str, body: dict[str, Any], price: int) -> None:
    async def go(limit: int) -> tuple[httpx.Response, int]:
        engines = two_engines(max_model_len=4096)
        async with client_of(app_of(engines, max_logprobs=limit)) as client:
            return await client.post(path, json=body), len(engines["w8a8"].submitted)

    refused, num_submitted = asyncio.run(go(price - 1))
    error = assert_refused(refused, 400, "invalid_value")
    assert (error["param"], num_submitted) == ("logprobs", 0)
    assert f"asks for {price} log-probabilities" in error["message"]
    assert f"limit is {price - 1} a request" in error["message"]
    served, _ = asyncio.run(go(price))
    assert served.status_code == 200, served.text


def test_a_chat_without_a_number_of_tokens_has_as_many_as_may_be_scored() -> None:
    async def go() -> int:
        engines = two_engines(max_model_len=4096)
        body = {"messages": HI, "n": 2, "logprobs": True, "top_logprobs": 4}
        async with client_of(app_of(engines, max_logprobs=1000)) as client:
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        return engines["w8a8"].submitted[0].params.max_tokens

    assert asyncio.run(go()) == 100


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_answer_is_built_off_the_event_loop(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    original = TextLogprobs.of_prompt

    def of_prompt(self: TextLogprobs, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        threads.add(threading.current_thread().name)
        return original(self, entries)

    monkeypatch.setattr(TextLogprobs, "of_prompt", of_prompt)

    async def go(num_prompt: int) -> set[str]:
        threads.clear()
        body = {"prompt": [97] * num_prompt, "echo": True, "logprobs": 20, "max_tokens": 1, "stream": stream}
        async with client_of(app_of(two_engines(max_model_len=4096))) as client:
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        return set(threads)

    assert asyncio.run(go(10)) == {"MainThread"}
    assert "MainThread" not in asyncio.run(go(1000))


class SlowGrammars(FakeGrammars):
    """Does not end while it compiles a schema that names `slow`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_slow = self.most_slow = self.num_given_up = 0

    def compile(self, rules: str, num_answers: int = 1, given_up: GivenUp | None = None) -> Grammar:
        grammar = super().compile(rules, num_answers)
        if "slow" in rules:
            assert given_up is not None
            self.num_slow += 1
            self.most_slow = max(self.most_slow, self.num_slow)
            given_up.add_done_callback(self._count_down)
            given_up.result(DEADLINE_S)
        return grammar

    def _count_down(self, _: GivenUp) -> None:
        self.num_slow -= 1
        self.num_given_up += 1


def schema_of(name: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {name: {"type": "boolean"}}, "required": [name]}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def test_a_schema_that_takes_long_keeps_only_its_own_key_and_no_longer_than_its_time() -> None:
    grammars = SlowGrammars()

    async def go() -> tuple[list[httpx.Response], httpx.Response]:
        app = app_of(two_engines(), api_keys="anna:anna-key-1,ben:ben-key-1", grammars=grammars)
        async with client_of(app) as client:

            def ask(owner: str, name: str, **more: Any) -> Awaitable[httpx.Response]:
                body = {"messages": HI, "max_tokens": 2, "response_format": schema_of(name), **more}
                return client.post(
                    "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {owner}-key-1"}
                )

            slow = [asyncio.ensure_future(ask("anna", f"slow{i}", timeout_s=0.5)) for i in range(6)]
            await until(lambda: bool(grammars.compiled))
            other = await ask("ben", "quick")
            late = await asyncio.gather(*slow)
            await until(lambda: not grammars.num_slow)
            return late, other

    late, other = asyncio.run(go())
    assert other.status_code == 200
    for response in late:
        assert assert_refused(response, 504, "deadline_exceeded")["param"] == "timeout_s"
    assert grammars.most_slow == 1, "one at a time of a key"
    assert grammars.num_given_up >= 1


def test_a_full_queue_has_room_for_the_share_of_another_key() -> None:
    """One key alone fills it; another one still gets in, up to half of it."""

    async def go() -> list[int]:
        app = app_of({"w8a8": FakeEngine("w8a8")}, max_waiting=4, api_keys="anna:anna-key-1,ben:ben-key-1")
        async with client_of(app):
            engine = app.state.serving.engines["w8a8"]
            told = []
            for owner in ("anna",) * 5 + ("ben",) * 3 + ("anna",):
                try:
                    engine.refuse_if_full(len(engine._streams), 4, owner)
                except QueueFull:
                    told.append(0)
                    continue
                told.append(1)
                engine._streams[len(told)] = RequestStream(
                    Submit("w8a8", 1, len(told), "r", [1], SamplingParams(owner=owner), 0.0, 0),
                    lambda *_: None,
                    asyncio.get_running_loop(),
                )
            engine._streams.clear()
            return told

    assert asyncio.run(go()) == [1, 1, 1, 1, 0, 1, 1, 0, 0]


def test_a_full_queue_says_when_to_come_back() -> None:
    async def go() -> httpx.Response:
        app = app_of(engines_of(FakeEngine("w8a8", max_waiting=0)))
        app.state.serving.engines["w8a8"].stats = lambda: stats(num_waiting=7, num_running=2)
        async with client_of(app) as client:
            app.state.serving.pace.add("w8a8", 5.0)
            return await client.post("/generate", json={"prompt": "a"})

    response = asyncio.run(go())
    assert_refused(response, 503, "queue_full")
    assert response.headers["retry-after"] == str(math.ceil((7 + 1) * 5.0 / 2))


class NeverStarting(FakeEngine):
    """Its requests wait for ever."""

    async def _generate(self, stream: FakeRequest) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waits_too_long_is_ended_and_freed(stream: bool) -> None:
    async def go() -> tuple[FakeEngine, httpx.Response, Samples, int]:
        engine = NeverStarting("w8a8")
        app = app_of(engines_of(engine), queue_timeout_s=0.05)
        async with client_of(app) as client:
            response = await client.post("/generate", json={"prompt": "a", "stream": stream})
            return engine, response, await metrics_of(client), app.state.serving.traffic.num_active

    engine, response, samples, num_active = asyncio.run(go())
    if stream:
        (event,) = events_of(response)
        assert event["error"]["code"] == "queue_timeout"
    else:
        assert "0.05 s" in assert_refused(response, 503, "queue_timeout")["message"]
    assert not engine.active
    assert num_active == 0
    assert samples["ottava_requests_total", "outcome=rejected", "variant=w8a8"] == 1
    assert samples["ottava_requests_total", "outcome=abort", "variant=w8a8"] == 0


def test_one_that_has_started_may_outlast_the_queue_timeout() -> None:
    response = post({"prompt": "a"}, app_of(two_engines(delay_s=0.3), queue_timeout_s=1))
    assert response.status_code == 200
    assert response.json()["metrics"]["e2e_ms"] > 50


@pytest.mark.parametrize("by_field", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended_and_freed(stream: bool, by_field: bool) -> None:
    async def go() -> tuple[FakeEngine, httpx.Response, Samples]:
        engines = two_engines(delay_s=0.2, reply="x" * 50)
        settings: dict[str, Any] = {} if by_field else {"request_timeout_s": 0.9}
        app = app_of(engines, **settings)
        async with client_of(app) as client:
            body = {"prompt": "a", "stream": stream} | ({"timeout_s": 0.9} if by_field else {})
            response = await client.post("/generate", json=body)
            return engines["w8a8"], response, await metrics_of(client)

    engine, response, samples = asyncio.run(go())
    if stream:
        *deltas, last = events_of(response)
        assert 1 <= len(deltas) <= 4
        assert "".join(delta["text"] for delta in deltas) == "x" * len(deltas)
        error = last["error"]
    else:
        error = assert_refused(response, 504, "deadline_exceeded")
    assert error["type"] == "timeout_error"
    assert "0.9 s" in error["message"]
    assert not engine.active
    assert [request.finish_reason for request in engine.freed] == ["abort"]
    assert samples["ottava_requests_total", "outcome=timeout", "variant=w8a8"] == 1


def test_the_deadline_of_a_comparison_is_one_for_both_runs() -> None:
    for timeout_s in (4, 20):
        engines = two_engines(reply="abc")
        engines["fp16"].delay_s = 60.0
        response = post({"prompt": "a", "compare": True, "timeout_s": timeout_s}, app_of(engines))
        assert_refused(response, 504, "deadline_exceeded")
        # Else the machine stood still until the deadline, before the second run.
        if engines["fp16"].submitted:
            break
    assert engines["w8a8"].freed[0].finish_reason == "stop"
    assert [request.finish_reason for request in engines["fp16"].freed] == ["abort"]


@pytest.mark.parametrize(("timeout_s", "status"), [(60, 200), (60.5, 400), (0, 400), (-1, 400), ("5", 422)])
def test_a_deadline_is_asked_for_up_to_the_limit(timeout_s: float | str, status: int) -> None:
    response = post({"prompt": "a", "timeout_s": timeout_s}, app_of(two_engines(), request_timeout_s=60))
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"]["param"] == "timeout_s"
    if timeout_s == 60.5:
        assert "limit of 60 s" in response.json()["error"]["message"]


def test_a_request_that_is_done_in_time_leaves_no_timer() -> None:
    async def go() -> tuple[httpx.Response, Samples]:
        async with client_of(app_of(two_engines(), queue_timeout_s=0.5, request_timeout_s=1)) as client:
            first = await client.post("/generate", json={"prompt": "a"})
            await asyncio.sleep(1.1)
            return first, await metrics_of(client)

    first, samples = asyncio.run(go())
    assert first.status_code == 200
    assert samples["ottava_requests_total", "outcome=stop", "variant=w8a8"] == 1
    assert samples["ottava_requests_total", "outcome=timeout", "variant=w8a8"] == 0


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "x" * 8}, 200, ()),
        ({"prompt": "x" * 9}, 400, ("9 tokens", "at most 8")),
        ({"prompt_ids": [1] * 9}, 400, ("9 tokens",)),
        ({"messages": [{"role": "user", "content": "x" * 9}]}, 400, ("at most 8",)),
        ({"prompt": "x", "max_tokens": 5}, 200, ()),
        ({"prompt": "x", "max_tokens": 6}, 400, ("`max_tokens` is 6", "at most 5")),
    ],
)
def test_limits_of_prompt_and_answer(body: dict[str, object], status: int, words: tuple[str, ...]) -> None:
    engines = two_engines()
    response = post({"ignore_eos": True, **body}, app_of(engines, max_prompt_tokens=8, max_tokens_limit=5))
    assert response.status_code == status, response.text
    assert not [word for word in words if word not in response.text]
    if status == 200:
        assert response.json()["usage"]["completion_tokens"] == 5
    else:
        assert not engines["w8a8"].submitted


def test_a_length_above_the_limit_is_refused_without_reading() -> None:
    num_read = 0

    async def go() -> list[Message]:
        app = app_of(two_engines(), max_body_bytes=1024)

        async def receive() -> Message:
            nonlocal num_read
            num_read += 1
            return {"type": "http.request", "body": b"", "more_body": True}

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", b"1025")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers, "query_string": b""}
        async with client_of(app):
            await app({**scope, "scheme": "http", "http_version": "1.1", "raw_path": b"/generate"}, receive, send)
        return sent

    start, body = asyncio.run(go())
    assert start["status"] == 413
    assert json.loads(body["body"])["error"]["code"] == "body_too_large"
    assert "1025 bytes" in json.loads(body["body"])["error"]["message"]
    assert num_read == 0


def test_a_chunked_body_is_refused_while_it_is_read() -> None:
    num_sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(100):
            num_sent += 1
            yield b" " * 1000

    async def go() -> tuple[httpx.Response, Samples]:
        app = app_of(two_engines(), max_body_bytes=4096)
        async with client_of(app) as client:
            headers = {"content-type": "application/json"}
            response = await client.post("/generate", content=chunks(), headers=headers)
            return response, await metrics_of(client)

    response, samples = asyncio.run(go())
    assert_refused(response, 413, "body_too_large")
    assert "4096" in response.text
    assert num_sent <= 6
    assert samples["ottava_requests_total", "outcome=rejected", "variant=none"] == 1


def test_waiting_ones_that_leave_free_the_concurrency_of_their_key() -> None:
    async def go() -> tuple[int, int, int]:
        engine = NeverStarting("w8a8")
        app = app_of(engines_of(engine), max_concurrent_per_key=1, queue_timeout_s=1)
        async with client_of(app) as client:
            first = asyncio.ensure_future(client.post("/generate", json={"prompt": "a"}))
            await until(lambda: bool(engine.active))
            second = await client.post("/generate", json={"prompt": "a"})
            await first
            third = await client.post("/generate", json={"prompt": "a"})
            return first.result().status_code, second.status_code, third.status_code

    assert asyncio.run(go()) == (503, 429, 503)


def test_every_refusal_is_counted_by_its_reason() -> None:
    async def go() -> Samples:
        app = app_of(two_engines(), api_keys="anna:anna-key-1", max_body_bytes=2000, max_concurrent_per_key=2)
        async with client_of(app) as client:
            await client.post("/generate", json={"prompt": "a"})
            client.headers["authorization"] = "Bearer anna-key-1"
            for body in ({"prompt": 1}, {"prompt": "a", "temperature": 9}, {"prompt": "a", "variant": "x"}):
                await client.post("/generate", json=body)
            await client.post("/generate", content=b" " * 3000)
            await client.post("/v1/completions", json={"prompt": "a", "n": 3})
            await client.post("/admin/reload", json={})
            assert (await client.post("/generate", json={"prompt": "a"})).status_code == 200
            return await metrics_of(client)

    samples = asyncio.run(go()).items()
    counted = {key[1:]: value for key, value in samples if key[0] == "ottava_refused_requests_total" and value}
    assert counted == {
        ("field=none", "reason=invalid_api_key"): 1,
        ("field=none", "reason=admin_closed"): 1,
        ("field=none", "reason=body_too_large"): 1,
        ("field=prompt", "reason=malformed"): 1,
        ("field=variant", "reason=variant_not_found"): 1,
        ("field=temperature", "reason=invalid_value"): 1,
        ("field=n", "reason=invalid_value"): 1,
    }
