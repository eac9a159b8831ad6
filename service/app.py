"""The HTTP application over any engines: `create_app`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from uuid import uuid4

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.engine.request import Engine
from service.metrics import ServiceMetrics
from service.routes import generate, health
from service.routes.failures import add_handlers, answer, internal_error
from service.routes.serving import Serving
from service.settings import Settings
from service.text import TokenizerLike

DESCRIPTION = "INT8 W8A8 language-model server, measured live against its FP16 baseline."
REQUEST_ID = "x-request-id"
MAX_REQUEST_ID_CHARS = 128

log = logging.getLogger(__name__)


def create_app(
    engines: Mapping[str, Engine],
    settings: Settings,
    tokenizer: TokenizerLike,
    info: Callable[[], dict[str, object]],
    self_check: Callable[[], Mapping[str, str]],
) -> FastAPI:
    """The application that serves these engines; the first is the default variant.

    Args:
        engines: variant -> running engine; at least one.
        settings: limits of the HTTP side.
        tokenizer: of the model that all variants share.
        info: what GET /info answers, JSON types only.
        self_check: runs once in a thread at start-up and returns variant -> reason for each that it refuses. Until
            it returns nothing is ready; if it raises, nothing becomes ready.
    """
    serving = Serving(engines, settings, tokenizer, info, ServiceMetrics(engines, info))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Beside the server and not before it: /health and /ready answer from the first moment.
        checking = asyncio.create_task(_check(serving, self_check))
        yield
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)

    app = FastAPI(title="ottava", description=DESCRIPTION, lifespan=lifespan)
    app.state.serving = serving
    add_handlers(app)
    app.include_router(generate.router)
    app.include_router(health.router)
    app.add_middleware(Envelope, max_body_bytes=settings.max_body_bytes)
    return app


async def _check(serving: Serving, self_check: Callable[[], Mapping[str, str]]) -> None:
    try:
        refused = dict(await asyncio.to_thread(self_check))
    except Exception as error:
        log.exception("the self-check raised: no variant becomes ready")
        refused = dict.fromkeys(serving.engines, f"the self-check raised {type(error).__name__}: {error}")
    for variant, reason in refused.items():
        log.error("variant %s refused by the self-check: %s", variant, reason)
    serving.refused = refused


class Envelope:
    """Around every request: its clock, its id, the limit of its body, and an answer even to a fault of ours."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get(REQUEST_ID))
        scope.setdefault("state", {}).update(received_s=time.perf_counter(), request_id=request_id)
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, _limited(receive, self._max_body_bytes), send_with_id)
        except Exception:
            log.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if has_started:
                raise
            await answer(500, internal_error())(scope, receive, send_with_id)


def _limited(receive: Receive, max_body_bytes: int) -> Receive:
    """receive, refusing with 413 as soon as more than max_body_bytes have come."""
    num_bytes = 0

    async def limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_body_bytes:
            raise HTTPException(413, f"the body is above the limit of {max_body_bytes} bytes; send a shorter prompt")
        return message

    return limited


def _request_id(given: str | None) -> str:
    """The client's id if it is short and printable, or a fresh one."""
    is_sane = given is not None and 0 < len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable()
    return given if is_sane and given is not None else uuid4().hex
