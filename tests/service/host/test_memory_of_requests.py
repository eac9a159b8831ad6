"""What a request held is freed when it has ended, without the garbage collector, which a server puts off."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from service.comparison.shadow import Sample
from service.engine.api import Token
from service.engine.masks import Constraint
from service.engine.messages import Logprob, News, Scored, Submit
from service.engine.request import Request
from service.engine.scheduler import Chunk, Step, StepResults
from service.engine.stream import RequestStream
from service.errors import OttavaError
from service.host.model_host import ModelHost
from service.host.reloader import open_host
from service.settings import Settings
from service.text.grammars.compiler import RulesMatcher
from service.web.generation.run import Piece, Plan, Run
from service.web.openai.choices import Choices
from service.web.routes.generate import Job
from tests.support.harness import app_over, server_of, until
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

HELD = (
    Request, Step, Chunk, StepResults, RulesMatcher, Constraint, RequestStream, Submit, Scored, News, Logprob, Token,
    Run, Plan, Piece, Choices, Job, Sample, OttavaError,
)  # fmt: skip
"""What belongs to one request."""

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
HELLO = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"messages": HELLO, "max_tokens": 12}
LOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "a prompt": ("/generate", {"prompt": "hello world", "max_tokens": 12}),
    "a penalty": ("/generate", {"prompt": "hello world", "max_tokens": 12, "repetition_penalty": 1.2}),
    "sampling": ("/generate", {"prompt": "hello world", "max_tokens": 12, "temperature": 1.0, "top_p": 0.9}),
    "log-probabilities": (
        "/v1/completions",
        {"prompt": ["hello world", "world"], "n": 3, "echo": True, "logprobs": 20, "max_tokens": 2},
    ),
    "scores alone": ("/v1/completions", {"prompt": "hello world", "echo": True, "logprobs": 20, "max_tokens": 0}),
    "a schema": ("/v1/chat/completions", {**CHAT, "n": 3, "response_format": JSON}),
    "log-probabilities of a chat": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 5}),
    "a comparison": ("/generate", {"prompt": "hello world", "max_tokens": 5, "compare": True}),
    "a stop string": ("/generate", {"prompt": "hello world", "max_tokens": 40, "stop": ["e", "a", "1", " "]}),
    "a deadline": ("/generate", {"prompt": "hello world", "max_tokens": 200, "ignore_eos": True, "timeout_s": 0.001}),
    "a refusal": ("/generate", {"prompt": "hello world", "max_tokens": 10**6}),
}

WAYS = ("whole", "streamed", "cut")


@contextmanager
def without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def held() -> Counter[str]:
    return Counter(type(each).__name__ for each in gc.get_objects() if issubclass(type(each), HELD))


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any], is_cut: bool) -> None:
    if not body.get("stream"):
        await client.post(path, json=body)
        return
    async with client.stream("POST", path, json=body) as response:
        async for _ in response.aiter_lines():
            if is_cut:
                break


async def left_by_each(host: ModelHost, settings: Settings) -> dict[str, Counter[str]]:
    """What is left of requests of all kinds at once, on kept connections, once they are over and replayed."""
    app = app_over(host, settings, host.tokenizer)
    serving, left = app.state.serving, {}
    async with server_of(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        async def ask_all(way: str) -> None:
            more = {} if way == "whole" else {"stream": True}
            asked = (ask(client, path, {**body, **more}, way == "cut") for path, body in LOADS.values())
            await asyncio.gather(*asked)
            await idle(serving)

        for way in WAYS:
            # What the first request of a kind sets up stays for the others.
            await ask_all(way)
            with without_collections():
                before = held()
                for _ in range(2):
                    await ask_all(way)
                # The last connections may still be closing.
                for _ in range(600):
                    left[way] = held() - before
                    if not left[way]:
                        break
                    await asyncio.sleep(0.05)
    return left


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    settings = Settings(
        model=str(folder),
        cache_dir=tmp_path_factory.mktemp("cache"),
        device="cpu",
        dtype="float32",
        calibration_windows=1,
        shadow_rate=1.0,
    )
    host = open_host(settings)
    # pytest keeps what is logged, tracebacks and all.
    logging.disable()
    try:
        return asyncio.run(left_by_each(host, settings))
    finally:
        logging.disable(logging.NOTSET)
        host.stop()


async def idle(serving: Any) -> None:
    def is_idle() -> bool:
        stats = [engine.stats() for engine in serving.engines.values()]
        return not any(s.num_running + s.num_waiting for s in stats) and not serving.shadow.num_waiting

    await until(lambda: serving.lifecycle.num_inside == 0 and is_idle())
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_of_a_request_that_is_over(left: dict[str, Counter[str]], way: str) -> None:
    assert left[way] == {}
