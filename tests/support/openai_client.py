"""OpenAI's own client over an app of fake engines."""

import asyncio
from contextlib import asynccontextmanager

import httpx2
import openai

from tests.support.harness import app_of, two_engines, until

TEXT = "naïve 😀 end"
USER = [{"role": "user", "content": "x"}]


@asynccontextmanager
async def openai_of(app):
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport) as http:
            await until(lambda: app.state.serving.is_ready)
            yield openai.AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=0)


def ask(work, **engine_options):
    """The result of work(client) against fresh engines, and the engine that it asked."""

    async def go():
        engines = two_engines(**engine_options)
        async with openai_of(app_of(engines)) as client:
            return await work(client), engines["w8a8"]

    return asyncio.run(go())


def complete(engine_options=None, **body):
    body = {"model": "fake", "prompt": "a", "max_tokens": 32, **body}
    return ask(lambda client: client.completions.create(**body), **(engine_options or {"reply": TEXT}))


def chat(engine_options=None, **body):
    body = {"model": "fake", "messages": USER, **body}
    return ask(lambda client: client.chat.completions.create(**body), **(engine_options or {"reply": TEXT}))


def stream(create, reply=TEXT, **body):
    """All chunks of a stream."""

    async def work(client):
        route = client.completions if create == "text" else client.chat.completions
        return [chunk async for chunk in await route.create(model="fake", stream=True, **body)]

    return ask(work, reply=reply)[0]
