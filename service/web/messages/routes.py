"""POST /v1/messages and /v1/messages/count_tokens: answers conversations in Anthropic's format."""

from __future__ import annotations

from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response

from service.telemetry.metrics import NO_VARIANT
from service.web.failures import MESSAGES, CountedRoute
from service.web.generation.blocks import Blocks
from service.web.generation.renaming import named_as_sent
from service.web.generation.reply import Closing, answered, streamed
from service.web.messages.answers import EVENTS, AnthropicMessage, TokenCount
from service.web.messages.events import MessageReply, failed
from service.web.messages.requests import CountRequest, MessagesRequest
from service.web.messages.translation import NAMES, chat_request
from service.web.openai.choices import Choices
from service.web.openai.plans import chat_plans, chat_prompt
from service.web.openapi import failures, generation
from service.web.schemas.failure import MessagesErrorResponse
from service.web.state import serving_of

router = APIRouter(route_class=CountedRoute, tags=["anthropic"])


@router.post(
    MESSAGES,
    response_model=AnthropicMessage,
    summary="Answer a conversation of blocks",
    responses=generation(
        "The answer; with `stream`, events with a name, the last of which is `message_stop` or `error`.",
        *EVENTS,
        MessagesErrorResponse,
        is_named=True,
        failure=MessagesErrorResponse,
    ),
)
async def answer_messages(body: MessagesRequest, http: HTTPRequest) -> Response:
    """Answer a conversation. It is the same as a chat, in another format."""
    serving = serving_of(http)
    with serving.metrics.counting_refusals(NO_VARIANT):
        variant = serving.models.variant_of(body.model)
    id_ = f"msg_{uuid4().hex}"
    with serving.metrics.counting_refusals(variant), named_as_sent(NAMES):
        plan = await chat_plans(
            id_,
            chat_request(body, takes_later_system=serving.tokenizer.takes_later_system),
            variant,
            serving,
            http.state.received_s,
            route=MESSAGES,
            most_tokens=body.max_tokens,
            receive=http.receive,
        )
    choices = Choices(plan.plans, serving)
    reply = MessageReply(
        choices.runs[0],
        Blocks(plan.answering()),
        model=serving.models.full_name(variant),
        max_tokens=body.max_tokens,
        max_model_len=serving.engines[variant].max_model_len,
    )
    if body.stream:
        return streamed(reply.events, http, choices.close, Closing(b"", failed))
    return await answered(reply.answer, http, choices.close)


@router.post(
    MESSAGES + "/count_tokens",
    summary="Count the tokens of a conversation",
    responses=failures(400, 401, 404, 422, 429, 503, model=MessagesErrorResponse),
)
async def count_tokens(body: CountRequest, http: HTTPRequest) -> TokenCount:
    """How many tokens the prompt of POST /v1/messages would have; nothing is generated."""
    serving = serving_of(http)
    with serving.metrics.counting_refusals(NO_VARIANT):
        variant = serving.models.variant_of(body.model)
    with serving.metrics.counting_refusals(variant), named_as_sent(NAMES):
        chat = chat_request(body, takes_later_system=serving.tokenizer.takes_later_system)
        ids, _ = await chat_prompt(chat, serving)
    return TokenCount(input_tokens=len(ids))
