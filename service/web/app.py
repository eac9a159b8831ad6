"""The HTTP application over any engines: `create_app`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service.engine.request import Engine
from service.process import start_thread
from service.settings import Settings
from service.telemetry.logs import log_request
from service.telemetry.tracing import open_tracer
from service.text.protocols import TokenizerLike
from service.web.failures import add_handlers
from service.web.middleware import surround
from service.web.openai import chat, completions, models
from service.web.openai.answers import ChatCompletionChunk
from service.web.openapi import document_events
from service.web.reloads import Reload, nothing_to_reload
from service.web.routes import admin, generate, health, page, records
from service.web.schemas.generate import Delta
from service.web.state import Serving

DESCRIPTION = "INT8 W8A8 language-model server, measured live against its FP16 baseline."

log = logging.getLogger(__name__)


def create_app(
    engines: Mapping[str, Engine],
    settings: Settings,
    tokenizer: TokenizerLike,
    info: Callable[[], dict[str, object]],
    self_check: Callable[[], Mapping[str, str]],
    reload: Reload = nothing_to_reload,
) -> FastAPI:
    """The application that serves these engines; the first is the default variant.

    Args:
        engines: variant -> running engine; at least one.
        settings: limits of the HTTP side.
        tokenizer: of the model that all variants share.
        info: what GET /info answers, JSON types only.
        self_check: runs once in a thread at start-up and returns variant -> reason for each that it refuses. Until
            it returns nothing is ready; if it raises, nothing becomes ready.
        reload: what POST /admin/reload and SIGHUP run, in a thread.

    Raises:
        InvalidSettings: of the API keys or the traces; see `Keyring` and `open_tracer`.
    """
    serving = Serving.over(engines, settings, tokenizer, info, reload)
    tracer = open_tracer(str(info().get("model")))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Beside the server and not before it: /health and /ready answer from the first moment.
        tasks = [asyncio.create_task(_check(serving, self_check)), asyncio.create_task(serving.shadow.run())]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(title="ottava", description=DESCRIPTION, lifespan=lifespan)
    app.state.serving = serving
    add_handlers(app)
    app.include_router(generate.router)
    app.include_router(completions.router)
    app.include_router(chat.router)
    app.include_router(models.router)
    app.include_router(health.router)
    app.include_router(admin.router)
    app.include_router(records.router)
    app.include_router(page.router)
    document_events(app, Delta, ChatCompletionChunk)
    surround(app, serving, [log_request] if tracer is None else [log_request, tracer.trace])
    return app


async def _check(serving: Serving, self_check: Callable[[], Mapping[str, str]]) -> None:
    try:
        refused = dict(await asyncio.wrap_future(start_thread("self-check", self_check)))
    except Exception as error:
        log.exception("the self-check raised: no variant becomes ready")
        refused = dict.fromkeys(serving.engines, f"the self-check raised {type(error).__name__}: {error}")
    for variant, reason in refused.items():
        log.error("variant %s refused by the self-check: %s", variant, reason)
    serving.refused = refused
