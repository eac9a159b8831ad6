"""The HTTP side over the real engine loop and scheduler; only the model is a fake."""

import asyncio
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from service.engine.device.device_thread import DeviceThread
from service.engine.loop import EngineLoop
from service.engine.messages import Logprob
from service.engine.scheduler import Scheduler, Step, StepResults
from tests.service.kinds import Samples
from tests.support.harness import DEADLINE_S, app_of, events_of, metrics_of, server_of, total, until
from tests.support.raw_client import leave_raw, open_raw

STEP_S = 0.002
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class AlphabetStep:
    ids: list[int]
    shape = None
    is_done = False

    def read(self) -> StepResults:
        time.sleep(STEP_S)
        logprobs = {place: Logprob(-0.1) for place in range(len(self.ids))}
        return StepResults(time.perf_counter(), self.ids, logprobs=logprobs)


class AlphabetRunner:
    """Every request's n-th token is the n-th letter."""

    kv_cache_bytes = 1

    def __init__(self, is_async: bool) -> None:
        self.is_async = self.only_launches = is_async

    def execute(self, step: Step) -> AlphabetStep:
        return AlphabetStep([ord(ALPHABET[c.index % 26]) for c in step.chunks if c.samples])


def expected(num_tokens: int, stop: str | None = None) -> str:
    text = (ALPHABET * (num_tokens // 26 + 1))[:num_tokens]
    return text.split(stop)[0] if stop else text


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def engines(request: pytest.FixtureRequest) -> Iterator[dict[str, EngineLoop]]:
    device_thread = DeviceThread()
    engines = {
        variant: EngineLoop(
            variant,
            Scheduler(num_blocks=60, block_size=16, max_num_requests=16, max_batched_tokens=64, eos_ids=frozenset({0})),
            AlphabetRunner(request.param),
            device_thread=device_thread,
            max_model_len=256,
        )
        for variant in ("w8a8", "fp16")
    }
    for engine in engines.values():
        engine.start()
    yield engines
    for engine in engines.values():
        engine.stop()


def _in_engines(engines: dict[str, EngineLoop]) -> int:
    return sum(engine.stats().num_running + engine.stats().num_waiting for engine in engines.values())


def test_200_requests_a_third_of_them_cut_off(engines: dict[str, EngineLoop]) -> None:
    rng = random.Random(0)

    def body_of(n: int) -> dict[str, Any]:
        body = {"prompt": "x" * rng.randrange(1, 120), "max_tokens": rng.randrange(1, 100)}
        body |= {"stream": n % 2 == 0, "variant": rng.choice(["w8a8", "fp16"])}
        return body | ({"stop": "xyz"} if n % 5 == 0 else {})

    async def one(client: httpx.AsyncClient, port: int, n: int) -> None:
        body = body_of(n)
        if n % 3 == 0:
            _, writer = await open_raw(port, body)
            await asyncio.sleep(rng.random() * 0.5)
            await leave_raw(writer)
            return
        response = await client.post("/generate", json=body)
        answer = events_of(response)[-1] if body["stream"] else response.json()
        assert answer["text"] == expected(body["max_tokens"], body.get("stop"))

    async def go() -> Samples:
        limits = httpx.Limits(max_connections=None)
        app = app_of(engines)
        async with server_of(app) as port:
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, limits=limits) as client:
                await asyncio.gather(*(one(client, port, n) for n in range(200)))
                await until(lambda: app.state.serving.traffic.num_active == 0 and _in_engines(engines) == 0)
                return await metrics_of(client)

    samples = asyncio.run(go())
    outcomes = {
        outcome: sum(v for k, v in samples.items() if k[0] == "ottava_requests_total" and f"outcome={outcome}" in k)
        for outcome in ("stop", "length", "abort", "error", "rejected")
    }
    assert total(samples, "ottava_requests_total") == 200
    assert outcomes["error"] == outcomes["rejected"] == 0
    assert outcomes["stop"] + outcomes["length"] >= 133
    assert outcomes["abort"] > 0
    assert total(samples, "ottava_kv_cache_usage_ratio") == 0
    assert total(samples, "ottava_num_requests_running") == 0


def test_requests_that_run_or_wait_too_long_are_freed(
    monkeypatch: pytest.MonkeyPatch, engines: dict[str, EngineLoop]
) -> None:
    """16 rows, 40 requests: some start and are too late, the others are too late before they start."""
    # 250 tokens take 10 s.
    monkeypatch.setattr(sys.modules[__name__], "STEP_S", 0.04)

    async def go() -> tuple[list[httpx.Response], str, Samples]:
        app = app_of(engines, queue_timeout_s=1, request_timeout_s=5)
        async with (
            server_of(app) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S) as client,
        ):
            body = {"prompt": "x", "max_tokens": 250}
            answers = await asyncio.gather(
                *(client.post("/generate", json={**body, "stream": n % 2 == 0}) for n in range(40))
            )
            await until(lambda: _in_engines(engines) == 0)
            after = await client.post("/generate", json={"prompt": "x", "max_tokens": 20})
            return answers, after.json()["text"], await metrics_of(client)

    answers, after, samples = asyncio.run(go())
    codes = [
        (events_of(answer)[-1] if answer.text.startswith("data") else answer.json())["error"]["code"]
        for answer in answers
    ]
    assert codes.count("deadline_exceeded") == 16
    assert codes.count("queue_timeout") == 24
    assert after == expected(20)
    assert total(samples, "ottava_kv_cache_usage_ratio") == 0
    assert samples["ottava_requests_total", "outcome=timeout", "variant=w8a8"] == 16
    assert samples["ottava_requests_total", "outcome=rejected", "variant=w8a8"] == 24


@pytest.mark.parametrize("stop", [None, "cd"])
def test_compare_alone_is_clean_and_agrees(engines: dict[str, EngineLoop], stop: str | None) -> None:
    async def go() -> tuple[httpx.Response, httpx.Response]:
        async with server_of(app_of(engines)) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            body = {"prompt": "abc", "compare": True, "max_tokens": 30} | ({"stop": stop} if stop else {})
            first = await client.post("/generate", json=body)
            await until(lambda: _in_engines(engines) == 0)
            return first, await client.post("/generate", json=body)

    for response in asyncio.run(go()):
        answer = response.json()
        assert answer["text"] == answer["baseline"]["text"] == expected(30, stop)
        assert answer["contended"] is False
        assert answer["agreement"]["match_ratio"] == 1
        assert answer["agreement"]["logprob_delta_mean"] == 0


PROMPT = "a system prompt that everybody sends, and then a question"
FULL_BLOCKS = 48
"""Tokens of the prompt's full blocks of 16."""


async def _cached(client: httpx.AsyncClient, key: str | None = None, **body: Any) -> int:
    """How many tokens of the prompt a request finds in the cache."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    response = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2} | body, headers=headers)
    found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


@pytest.mark.parametrize("sharing", [False, True])
def test_a_key_finds_its_own_prompts_in_the_cache_and_others_only_if_allowed(
    engines: dict[str, EngineLoop], sharing: bool
) -> None:
    async def go() -> tuple[list[int], Samples]:
        app = app_of(engines, api_keys="ann:aaaaaaaa,bob:bbbbbbbb", public_routes="metrics", prefix_sharing=sharing)
        async with server_of(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            found = [await _cached(client, key) for key in ("aaaaaaaa", "aaaaaaaa", "bbbbbbbb", "bbbbbbbb")]
            return found, await metrics_of(client)

    found, samples = asyncio.run(go())
    assert found == [0, FULL_BLOCKS, FULL_BLOCKS if sharing else 0, FULL_BLOCKS]
    assert total(samples, "ottava_prefix_cache_hit_tokens_total") == sum(found)
    assert samples["ottava_prompt_tokens_total", "variant=w8a8"] == 4 * len(PROMPT)


def test_both_runs_of_a_comparison_start_from_as_much_of_the_prompt(engines: dict[str, EngineLoop]) -> None:
    """The least that either has, not what the variant that everybody asks has."""

    async def go() -> tuple[list[tuple[int, int]], dict[str, Any]]:
        async with server_of(app_of(engines)) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert [await _cached(client) for _ in range(2)] == [0, FULL_BLOCKS]
            compared = []
            for _ in range(2):
                await until(lambda: _in_engines(engines) == 0)
                body = {"prompt": PROMPT, "compare": True, "max_tokens": 3}
                answer = (await client.post("/generate", json=body)).json()
                compared.append((answer["metrics"]["cached_tokens"], answer["baseline"]["metrics"]["cached_tokens"]))
            return compared, (await client.get("/compare")).json()

    compared, summary = asyncio.run(go())
    assert compared == [(0, 0), (FULL_BLOCKS, FULL_BLOCKS)]
    assert (summary["compare"]["count"], summary["compare"]["unequal"]) == (2, 0)
    assert summary["compare"]["speedup_median"]["ttft"] is not None


def test_echoed_log_probabilities_find_nothing(engines: dict[str, EngineLoop]) -> None:
    async def go() -> list[int]:
        async with server_of(app_of(engines)) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            return [await _cached(client), await _cached(client, echo=True, logprobs=0), await _cached(client)]

    assert asyncio.run(go()) == [0, 0, FULL_BLOCKS]
