"""POST /generate over fake engines: answers, streams, stop strings, limits, failures."""

import asyncio
import json
import math
from collections.abc import Collection, Sequence
from typing import Any, Never

import httpx
import pytest

from tests.service.kinds import Samples
from tests.support.fake_engine import ByteDetokenizer, ByteTokenizer, FakeEngine
from tests.support.harness import app_of, client_of, engines_of, events_of, metrics_of, post, two_engines, until

FUNCTION = {"type": "function", "function": {"name": "f"}}
RUN_METRICS = {
    "queue_ms",
    "prefill_ms",
    "ttft_ms",
    "itl_ms",
    "tpot_ms",
    "e2e_ms",
    "prompt_tokens",
    "generated_tokens",
    "cached_tokens",
    "accepted_tokens",
    "tokens_per_s",
    "batch_size_mean",
}


def test_answer_has_every_field() -> None:
    response = post({"prompt": "hi"}, reply="hello")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert set(answer) == {"id", "variant", "text", "token_ids", "finish_reason", "usage", "metrics"}
    assert (answer["variant"], answer["text"], answer["finish_reason"]) == ("w8a8", "hello", "stop")
    assert answer["token_ids"] == [*b"hello", 0]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    metrics = answer["metrics"]
    assert set(metrics) == RUN_METRICS
    assert (metrics["prompt_tokens"], metrics["generated_tokens"]) == (2, 6)
    assert (metrics["cached_tokens"], metrics["accepted_tokens"]) == (0, 0)
    assert metrics["batch_size_mean"] == 1
    assert 0 < metrics["ttft_ms"] <= metrics["e2e_ms"]
    assert metrics["tpot_ms"] == pytest.approx((metrics["e2e_ms"] - metrics["ttft_ms"]) / 5)
    assert metrics["queue_ms"] + metrics["prefill_ms"] <= metrics["ttft_ms"]


@pytest.mark.parametrize(
    ("body", "prompt_ids"),
    [
        ({"prompt": "hé"}, list("hé".encode())),
        ({"prompt_ids": [0, 255]}, [0, 255]),
        ({"messages": [{"role": "user", "content": "x"}]}, list(b"user:x\n")),
    ],
)
def test_each_form_of_prompt_reaches_the_engine(body: dict[str, object], prompt_ids: list[int]) -> None:
    engines = two_engines()
    assert post(body, app_of(engines)).status_code == 200
    assert engines["w8a8"].submitted[0].prompt_ids == prompt_ids


def test_every_parameter_reaches_the_engine() -> None:
    engines = two_engines()
    asked = {
        "max_tokens": 7,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 5,
        "priority": -3,
        "ignore_eos": True,
        "logprobs": 2,
    }
    answer = post({"prompt": "a", "variant": "fp16", **asked}, app_of(engines)).json()
    params = engines["fp16"].submitted[0].params
    assert {name: getattr(params, name) for name in asked} == asked
    assert answer["finish_reason"] == "length"
    assert not engines["w8a8"].submitted


def test_top_k_above_the_vocabulary_is_off() -> None:
    engines = two_engines()
    post({"prompt": "a", "top_k": 256}, app_of(engines))
    assert engines["w8a8"].submitted[0].params.top_k == 0


def test_one_token_has_no_itl() -> None:
    metrics = post({"prompt": "a", "max_tokens": 1}).json()["metrics"]
    assert metrics["itl_ms"] is None
    assert metrics["tpot_ms"] is None
    assert metrics["e2e_ms"] == metrics["ttft_ms"]


def test_logprobs_only_when_asked() -> None:
    answer = post({"prompt": "a", "logprobs": 1}, reply="ab").json()
    assert answer["logprobs"][0] == {"id": 97, "logprob": -0.5, "top": [{"id": 97, "logprob": -0.5}]}
    assert len(answer["logprobs"]) == 3
    answer = post({"prompt": "a", "logprobs": 0}, reply="ab").json()
    assert answer["logprobs"][0] == {"id": 97, "logprob": -0.5, "top": []}


@pytest.mark.parametrize("tokens_per_step", [1, 2, 5])
def test_stream_adds_up_to_the_answer(tokens_per_step: int) -> None:
    response = post(
        {"prompt": "a", "stream": True, "logprobs": 0}, reply="naïve 😀 end", tokens_per_step=tokens_per_step
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *deltas, last = events_of(response)
    assert "".join(delta["text"] for delta in deltas) == last["text"] == "naïve 😀 end"
    assert [token_id for delta in deltas for token_id in delta["token_ids"]] == last["token_ids"]
    assert [item for delta in deltas for item in delta["logprobs"]] == last["logprobs"]
    assert "�" not in last["text"]
    assert last["finish_reason"] == "stop"
    assert set(last["metrics"]) == RUN_METRICS
    assert {delta["id"] for delta in deltas} == {last["id"]}
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_stop_string_across_tokens(stream: bool, tokens_per_step: int) -> None:
    engines = two_engines(reply="one END two", tokens_per_step=tokens_per_step)
    response = post({"prompt": "a", "stop": ["zzz", " END"], "stream": stream}, app_of(engines))
    answer = events_of(response)[-1] if stream else response.json()
    assert (answer["text"], answer["finish_reason"]) == ("one", "stop")
    assert bytes(answer["token_ids"]) == b"one END"
    assert answer["usage"]["completion_tokens"] == 7
    if stream:
        assert "".join(event["text"] for event in events_of(response)[:-1]) == "one"
    assert not engines["w8a8"].active
    assert engines["w8a8"].freed[0].finish_reason == "stop"


def test_text_held_for_a_stop_string_comes_at_the_end() -> None:
    *deltas, last = events_of(post({"prompt": "a", "stop": "lollipop", "stream": True}, reply="xlol"))
    assert last["text"] == "xlol"
    assert "".join(delta["text"] for delta in deltas) == "xlol"


def test_incomplete_character_comes_as_replacement() -> None:
    assert post({"prompt": "a", "max_tokens": 2}, reply="a😀").json()["text"] == "a�"


def test_default_max_tokens_is_what_the_context_leaves() -> None:
    engines = two_engines(max_model_len=64)
    answer = post({"prompt": "x" * 60, "ignore_eos": True}, app_of(engines)).json()
    assert answer["usage"]["completion_tokens"] == 4
    answer = post({"prompt": "x", "ignore_eos": True}, app_of(two_engines(max_model_len=999))).json()
    assert answer["usage"]["completion_tokens"] == 128


BAD = [
    ({"prompt": "a", "temprature": 1}, 422, "temprature", ["temprature", "did you mean `temperature`"]),
    ({"prompt": "a", "nonsense": 1}, 422, "nonsense", ["leave it out"]),
    ({"prompt": 5}, 422, "prompt", ["prompt", "5", "string"]),
    ({"prompt": "a", "max_tokens": "5"}, 422, "max_tokens", ["'5'", "integer"]),
    ({"prompt": "a", "max_tokens": 1.5}, 422, "max_tokens", ["1.5"]),
    ({"prompt": "a", "max_tokens": True}, 422, "max_tokens", ["True"]),
    ({"prompt": "a", "stream": 1}, 422, "stream", ["boolean"]),
    ({"prompt": "a", "stop": 3}, 422, "stop", ["3"]),
    ({"prompt": "a", "stop": [3]}, 422, "stop", ["stop.0"]),
    ({"prompt": "a", "variant": 3}, 422, "variant", ["3"]),
    ({}, 422, None, ["prompt, messages and prompt_ids", "none"]),
    ({"prompt": "a", "prompt_ids": [1]}, 422, None, ["prompt and prompt_ids"]),
    ({"messages": [{"role": "user"}]}, 400, "messages", ["`messages.0`", "no `content`"]),
    ({"messages": [{"role": "user", "content": "a", "nam": "b"}]}, 422, "messages", ["messages.0.nam", "`name`"]),
    ({"prompt": "a", "tools": [FUNCTION]}, 400, None, ["`tools` without `messages`"]),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [FUNCTION]}, 400, "tools", ["has no tools"]),
    ([1], 422, None, ["JSON object"]),
    ({"prompt": ""}, 400, "prompt", ["empty"]),
    ({"messages": []}, 400, "messages", ["empty"]),
    ({"prompt_ids": []}, 400, "prompt_ids", ["empty"]),
    ({"prompt_ids": [1, 256]}, 400, "prompt_ids", ["256", "255"]),
    ({"prompt_ids": [-1]}, 400, "prompt_ids", ["-1", "0 to 255"]),
    ({"prompt": "x" * 64}, 400, "prompt", ["64 tokens", "context holds 64", "at most 63"]),
    ({"messages": [{"role": "user", "content": "x" * 90}]}, 400, "messages", ["context"]),
    ({"messages": [{"role": "cook", "content": "x"}]}, 400, "messages", ["messages.0.role", "cook", "'user'"]),
    (
        {"prompt": "x" * 60, "max_tokens": 5},
        400,
        "max_tokens",
        ["`max_tokens` is 5", "60", "largest possible here is 4"],
    ),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", ["is 0", "at least 1"]),
    ({"prompt": "a", "temperature": -0.1}, 400, "temperature", ["-0.1", "at least 0"]),
    ({"prompt": "a", "temperature": 2.1}, 400, "temperature", ["2.1", "at most 2"]),
    ({"prompt": "a", "top_p": 0}, 400, "top_p", ["more than 0"]),
    ({"prompt": "a", "top_p": 1.1}, 400, "top_p", ["at most 1"]),
    ({"prompt": "a", "top_k": -1}, 400, "top_k", ["-1", "at least 0"]),
    ({"prompt": "a", "min_p": 2}, 400, "min_p", ["at most 1"]),
    ({"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty", ["at least 0.1"]),
    ({"prompt": "a", "logprobs": 21}, 400, "logprobs", ["21", "at most 20"]),
    ({"prompt": "a", "seed": -1}, 400, "seed", ["at least 0"]),
    ({"prompt": "a", "seed": 1 << 63}, 400, "seed", ["send less than"]),
    ({"prompt": "a", "stop": ""}, 400, "stop", ["stop.0", "at least 1"]),
    ({"prompt": "a", "stop": ["a"] * 17}, 400, "stop", ["the limit is 16"]),
    ({"prompt": "a", "stop": "x" * 257}, 400, "stop", ["256"]),
    ({"prompt": "a", "variant": "int4"}, 404, "variant", ["int4", "w8a8, fp16"]),
    ({"prompt": "a", "variant": ""}, 404, "variant", ["''"]),
    ({"prompt": "a", "variant": "fp16", "compare": True}, 400, "compare", ["baseline itself", "leave out"]),
]


@pytest.mark.parametrize(("body", "status", "param", "words"), BAD)
def test_bad_input_names_field_limit_and_remedy(
    body: dict[str, object] | list[int], status: int, param: str | None, words: list[str]
) -> None:
    engines = two_engines()
    response = post(body, app_of(engines))
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert [word for word in words if word not in error["message"]] == []
    assert not any(engine.submitted for engine in engines.values())


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_a_number_that_is_not_finite_is_refused(field: str, word: str) -> None:
    response = _raw(b'{"prompt": "a", "%s": %s}' % (field.encode(), word.encode()))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert "finite" in error["message"]
    assert ("nan" if word == "NaN" else "inf") in error["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b'{"prompt": ', {}, 422),
        (b"", {}, 422),
        (b"null", {}, 422),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}, 422),
        (b'{"prompt": "\\ud800"}', {}, 400),
        (b'{"prompt": "a", "stop": "\\udfff"}', {}, 400),
        (b'{"prompt": "a", "\\ud800": 1}', {}, 422),
        (b'{"prompt": "a", "variant": "\\ud800"}', {}, 404),
        (b"\xff\xfe\xfa", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", {}, 400),
    ],
)
def test_a_body_that_is_no_request(content: bytes, headers: dict[str, str], status: int) -> None:
    response = _raw(content, headers)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def _raw(content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client_of(app_of(two_engines())) as client:
            return await client.post(
                "/generate", content=content, headers={"content-type": "application/json", **(headers or {})}
            )

    return asyncio.run(go())


def test_body_above_the_limit() -> None:
    response = post({"prompt": "x" * 2000}, app_of(two_engines(), max_body_bytes=1024))
    assert response.status_code == 413
    assert "1024" in response.json()["error"]["message"]


def test_full_queue_asks_to_come_back() -> None:
    response = post({"prompt": "a"}, max_waiting=0)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "queue_full"
    response = post({"prompt": "a", "stream": True}, max_waiting=0)
    assert response.status_code == 503


def test_engine_failure_mid_run() -> None:
    response = post({"prompt": "a"}, fail_at=2)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failed"
    assert "secret" not in response.text


def test_engine_failure_mid_stream_ends_with_an_error_event() -> None:
    response = post({"prompt": "a", "stream": True}, reply="abc", fail_at=2)
    assert response.status_code == 200
    events = events_of(response)
    assert "".join(event["text"] for event in events[:-1]) == "ab"
    assert events[-1]["error"]["code"] == "engine_failed"
    assert "[DONE]" not in response.text


def test_a_failed_engine_refuses_and_health_says_why() -> None:
    async def go() -> tuple[httpx.Response, ...]:
        engines = two_engines(fail_at=1)
        async with client_of(app_of(engines)) as client:
            await client.post("/generate", json={"prompt": "a"})
            again = await client.post("/generate", json={"prompt": "a"})
            other = await client.post("/generate", json={"prompt": "a", "variant": "fp16", "max_tokens": 1})
            return again, other, await client.get("/health"), await client.get("/ready")

    again, other, health, ready = asyncio.run(go())
    assert (again.status_code, again.json()["error"]["code"]) == (500, "engine_failed")
    assert other.status_code == 200
    assert health.status_code == ready.status_code == 503
    assert "RuntimeError" in health.json()["variants"]["w8a8"]
    assert set(ready.json()["variants"]) == {"w8a8"}


def test_a_fault_of_ours_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def explode(*_: object) -> Never:
        raise RuntimeError("secret")

    for stream in (False, True):
        app = app_of(engines_of(FakeEngine("w8a8")))
        app.state.serving.engines["w8a8"].submit = explode
        response = post({"prompt": "a", "stream": stream}, app)
        assert app.state.serving.traffic.num_active == 0
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert response.headers["x-request-id"]
    assert "secret" in caplog.text


def test_a_fault_in_decoding_frees_the_request() -> None:
    class Faulty(ByteDetokenizer):
        def push(self, token_id: int) -> Never:
            raise RuntimeError("secret")

    class Tokenizer(ByteTokenizer):
        def encode(self, text: str, adds_special: bool = True) -> list[int]:
            return [1]

        def detokenizer(self, context: Sequence[int] = (), shown: Collection[str] = ()) -> Faulty:
            return Faulty()

    async def go(is_streamed: bool) -> httpx.Response:
        engines = two_engines(delay_s=0.01)
        async with client_of(app_of(engines, tokenizer=Tokenizer())) as client:
            response = await client.post("/generate", json={"prompt": "a", "stream": is_streamed})
            await until(lambda: not engines["w8a8"].active)
            return response

    for is_streamed in (False, True):
        response = asyncio.run(go(is_streamed))
        assert "internal_error" in response.text
        assert "secret" not in response.text


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/generate", {"prompt": "a", "stream": True}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
    ],
)
def test_a_fault_before_decoding_frees_the_request(route: str, body: dict[str, Any]) -> None:
    class Tokenizer(ByteTokenizer):
        def detokenizer(self, context: Sequence[int] = (), shown: Collection[str] = ()) -> Never:
            raise RuntimeError("secret")

    async def go() -> tuple[httpx.Response, Samples, FakeEngine]:
        engines = two_engines(delay_s=0.01)
        app = app_of(engines, tokenizer=Tokenizer())
        async with client_of(app) as client:
            response = await client.post(route, json=body)
            await until(lambda: not engines["w8a8"].active)
            assert app.state.serving.traffic.num_active == 0
            return response, await metrics_of(client), engines["w8a8"]

    response, samples, engine = asyncio.run(go())
    assert (response.status_code, len(engine.submitted)) == (500, 1)
    assert "secret" not in response.text
    assert samples["ottava_requests_total", "outcome=error", "variant=w8a8"] == 1


def test_many_at_once_keep_their_own_answers() -> None:
    async def go() -> list[httpx.Response]:
        engines = two_engines(reply=lambda ids, params: bytes(ids).decode()[::-1])
        async with client_of(app_of(engines)) as client:
            bodies = [{"prompt": f"request {n}", "stream": n % 2 == 0} for n in range(40)]
            return await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))

    for n, response in enumerate(asyncio.run(go())):
        answer = events_of(response)[-1] if n % 2 == 0 else response.json()
        assert answer["text"] == f"request {n}"[::-1]


def test_openapi_documents_every_field() -> None:
    async def go() -> dict[str, Any]:
        async with client_of(app_of(two_engines())) as client:
            document: dict[str, Any] = (await client.get("/openapi.json")).json()
            return document

    api = asyncio.run(go())
    request = api["components"]["schemas"]["GenerateRequest"]
    assert request["additionalProperties"] is False
    assert all(field.get("description") for field in request["properties"].values())
    responses = api["paths"]["/generate"]["post"]["responses"]
    assert {"200", "400", "404", "413", "422", "500", "503"} <= set(responses)
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert json.dumps(api)
    assert math.isclose(request["properties"]["temperature"]["maximum"], 2)
