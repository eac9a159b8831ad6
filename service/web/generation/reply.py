"""Sends a generation as a whole or as a stream, and frees it in any case, also if the client disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import NamedTuple, TypeVar

from fastapi import Request as HTTPRequest
from pydantic import BaseModel
from starlette.responses import Response

from service.errors import OttavaError
from service.web.failures import error_body, internal_error
from service.web.generation.sse import DONE, EventStream, event, unless_disconnected
from service.web.schemas.failure import ErrorResponse

THREAD_LOGPROBS = 4096
"""Beyond this many, about 1 MB as text, building them would keep the event loop from others for milliseconds."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Closing(NamedTuple):
    """How a stream ends.

    done: sent after the last event, unless something fails.
    failed: the event that ends a stream in which something has failed.
    """

    done: bytes = DONE
    failed: Callable[[ErrorResponse], bytes] = event


OPENAI = Closing()


def streamed(
    events: Callable[[], AsyncGenerator[BaseModel | bytes, None]],
    http: HTTPRequest,
    close: Callable[[], None],
    closing: Closing = OPENAI,
) -> Response:
    """A stream of the events, encoded or as models, up to its closing. Calls `close` at the end or on disconnect."""
    return EventStream(_guarded(events, http.state.request_id, closing), close)


async def answered(
    work: Callable[[], Coroutine[object, object, BaseModel]], http: HTTPRequest, close: Callable[[], None]
) -> Response:
    """The complete answer as JSON, without unset fields. Calls `close` as `streamed` does.

    Raises ClientGone as `unless_disconnected`.
    """
    try:
        answer = await unless_disconnected(http.receive, work())
    finally:
        close()
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


async def built(build: Callable[[], T], num_logprobs: int) -> T:
    """What build returns; it is called on a thread if it has to put many log-probabilities into models."""
    return await asyncio.to_thread(build) if num_logprobs > THREAD_LOGPROBS else build()


async def _guarded(
    events: Callable[[], AsyncGenerator[BaseModel | bytes, None]], request_id: str, closing: Closing
) -> AsyncIterator[bytes]:
    """Encode server-sent events. An error ends them without `done`, so that clients can detect a cut-off answer."""
    try:
        async with aclosing(events()) as items:
            async for item in items:
                yield item if isinstance(item, bytes) else event(item)
        if closing.done:
            yield closing.done
    except OttavaError as error:
        log.exception("request %s: stream ended early", request_id)
        yield closing.failed(error_body(error))
    except Exception:
        log.exception("request %s: stream ended early", request_id)
        yield closing.failed(internal_error())
