"""POST /v1/responses: answers conversations in the format of OpenAI's Responses API. Nothing is stored."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response

from service.engine.api import SamplingParams
from service.errors import UnknownResponse
from service.telemetry.metrics import NO_VARIANT
from service.web.failures import CountedRoute
from service.web.generation.blocks import Blocks
from service.web.generation.renaming import named_as_sent
from service.web.generation.reply import Closing, answered, streamed
from service.web.openai.choices import Choices
from service.web.openai.plans import chat_plans
from service.web.openapi import failures, generation
from service.web.responses.answers import EVENTS, ModelResponse
from service.web.responses.events import ResponseReply
from service.web.responses.requests import ResponsesRequest
from service.web.responses.tools import split_names
from service.web.responses.translation import NAMES, chat_request
from service.web.schemas.failure import ErrorResponse
from service.web.state import Serving, serving_of

ROUTE = "/v1/responses"
MAX_SHOWN = 80
router = APIRouter(route_class=CountedRoute, tags=["openai"])
stored = APIRouter(tags=["openai"], responses=failures(401, 404, 422))


@router.post(
    ROUTE,
    response_model=ModelResponse,
    summary="Answer a conversation of items",
    responses=generation(
        "The answer; with `stream`, events with a name, the last of which is `response.completed`, "
        "`response.incomplete` or `response.failed`.",
        *EVENTS,
        is_named=True,
    ),
)
async def respond(body: ResponsesRequest, http: HTTPRequest) -> Response:
    """Answer a conversation. It is the same as a chat, in another format."""
    serving = serving_of(http)
    with serving.metrics.counting_refusals(NO_VARIANT):
        variant = serving.models.variant_of(body.model)
    id_ = f"resp_{uuid4().hex}"
    with serving.metrics.counting_refusals(variant), named_as_sent(NAMES):
        chat = chat_request(body, takes_later_system=serving.tokenizer.takes_later_system)
        plan = await chat_plans(id_, chat, variant, serving, http.state.received_s, route=ROUTE, receive=http.receive)
    choices = Choices(plan.plans, serving)
    head = _head(id_, body, variant, serving, plan.plans[0].params)
    reply = ResponseReply(choices.runs[0], Blocks(plan.answering()), head=head, spaces=split_names(body.tools))
    if body.stream:
        return streamed(reply.events, http, choices.close, Closing(b"", reply.failed))
    return await answered(reply.answer, http, choices.close)


@stored.get(ROUTE + "/{response_id}", summary="An earlier answer: none is stored", status_code=404)
async def stored_response(response_id: str) -> ErrorResponse:
    """Always 404: answers are not stored."""
    raise _not_stored(response_id)


def _not_stored(response_id: str) -> UnknownResponse:
    return UnknownResponse(
        f"the response {response_id[:MAX_SHOWN]!r} is not here: this server stores no answers, whatever `store` says; "
        "keep them yourself, and send the whole conversation in `input`",
        "response_id",
    )


def _head(id_: str, body: ResponsesRequest, variant: str, serving: Serving, params: SamplingParams) -> dict[str, Any]:
    """The fields of an answer that do not change."""
    format_ = {"type": "text"} if body.text is None or body.text.format is None else _sent(body.text.format)
    return {
        "id": id_,
        "object": "response",
        "created_at": int(time.time()),
        "model": serving.models.full_name(variant),
        "system_fingerprint": serving.models.fingerprint(variant),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "tool_choice": "auto" if body.tool_choice is None else _sent(body.tool_choice),
        "tools": [_sent(tool) for tool in body.tools],
        "text": {"format": format_},
        "reasoning": None if body.reasoning is None else _sent(body.reasoning),
        "store": False,
        "background": False,
        "previous_response_id": None,
        "truncation": "disabled",
    }


def _sent(value: Any) -> Any:
    """What the client sent, without what it left out."""
    return value.model_dump(by_alias=True, exclude_unset=True) if hasattr(value, "model_dump") else value
