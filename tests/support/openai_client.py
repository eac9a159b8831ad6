"""OpenAI's own client over an app of fake engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx2
import openai
from fastapi import FastAPI
from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.support.fake_engine import FakeEngine
from tests.support.harness import app_of, two_engines, until

T = TypeVar("T")

TEXT = "naïve 😀 end"
USER = [{"role": "user", "content": "x"}]


@asynccontextmanager
async def openai_of(app: FastAPI) -> AsyncIterator[openai.AsyncOpenAI]:
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport) as http:
            await until(lambda: app.state.serving.is_ready)
            yield openai.AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=0)


def ask(work: Callable[[openai.AsyncOpenAI], Awaitable[T]], **engine_options: Any) -> tuple[T, FakeEngine]:
    """The result of work(client) against fresh engines, and the engine that it asked."""

    async def go() -> tuple[T, FakeEngine]:
        engines = two_engines(**engine_options)
        async with openai_of(app_of(engines)) as client:
            return await work(client), engines["w8a8"]

    return asyncio.run(go())


def complete(engine_options: dict[str, Any] | None = None, **body: Any) -> tuple[Completion, FakeEngine]:
    body = {"model": "fake", "prompt": "a", "max_tokens": 32, **body}
    return ask(lambda client: client.completions.create(**body), **(engine_options or {"reply": TEXT}))


def chat(engine_options: dict[str, Any] | None = None, **body: Any) -> tuple[ChatCompletion, FakeEngine]:
    body = {"model": "fake", "messages": USER, **body}
    return ask(lambda client: client.chat.completions.create(**body), **(engine_options or {"reply": TEXT}))


def stream(create: str, reply: str = TEXT, **body: Any) -> list[Any]:
    """All chunks of a stream."""

    async def work(client: openai.AsyncOpenAI) -> list[Any]:
        route = client.completions if create == "text" else client.chat.completions
        return [chunk async for chunk in await route.create(model="fake", stream=True, **body)]

    return ask(work, reply=reply)[0]
