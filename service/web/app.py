"""Builds the HTTP application over the engines: `create_app`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from service.errors import Draining
from service.settings import Settings
from service.telemetry.logs import log_request
from service.telemetry.tracing import open_tracer
from service.web.failures import add_handlers
from service.web.messages import routes as messages
from service.web.messages.answers import EVENTS as MESSAGE_EVENTS
from service.web.middleware import surround
from service.web.openai import chat as openai_chat
from service.web.openai import completions as openai_completions
from service.web.openai import models as openai_models
from service.web.openai import tokenize as openai_tokenize
from service.web.openai.answers import ChatCompletionChunk
from service.web.openapi import document_events
from service.web.responses import routes as responses
from service.web.responses.answers import EVENTS as RESPONSE_EVENTS
from service.web.routes import admin, generate, health, page, records
from service.web.schemas.generate import Delta
from service.web.state import Host, Serving

ROUTERS = (
    generate.router,
    openai_completions.router,
    openai_chat.router,
    openai_models.router,
    responses.router,
    responses.stored,
    messages.router,
    openai_tokenize.router,
    health.router,
    admin.router,
    records.router,
    page.router,
)
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""Of FastAPI, which would add spans of its own to those of `service.telemetry` where a process has a global tracer."""

DESCRIPTION = "INT8 W8A8 language-model server, measured live against its FP16 baseline."


def create_app(host: Host, settings: Settings) -> FastAPI:
    """The application that serves these engines. Its lifespan opens and closes them.

    Raises:
        InvalidSettings: the settings of API keys or traces are invalid; see `Keyring` and `open_tracer`.
    """
    serving = Serving.over(host, settings)
    tracer = open_tracer(lambda: serving.models.name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Runs as a task rather than before the server starts, so that /health and /ready answer at once.
        tasks = [asyncio.create_task(host.run()), asyncio.create_task(serving.shadow.run())]
        yield
        await host.close(Draining("the server has stopped"))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(title="ottava", description=DESCRIPTION, lifespan=lifespan, telemetry=NO_TELEMETRY)
    app.state.serving = serving
    add_handlers(app)
    # Not `include_router`, which looks for a request's route twice, and in layers.
    for router in ROUTERS:
        app.router.routes.extend(router.routes)
    document_events(app, Delta, ChatCompletionChunk, *RESPONSE_EVENTS, *MESSAGE_EVENTS)
    if tracer is None:
        surround(app, serving, [log_request])
    else:
        surround(app, serving, [log_request, tracer.trace], [tracer.begin])
    return app
