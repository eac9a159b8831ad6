"""POST /v1/chat/completions: answers conversations in OpenAI's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response

from service.engine.api import FinishReason
from service.telemetry.metrics import NO_VARIANT
from service.text.protocols import TokenizerLike
from service.web.failures import CountedRoute
from service.web.generation.reply import answered, streamed
from service.web.generation.run import Piece, Run
from service.web.generation.tool_use import end_of, whole
from service.web.openai.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    OpenAIUsage,
)
from service.web.openai.choices import Choices, New, Reply, head_of
from service.web.openai.logprobs import chat_logprobs
from service.web.openai.plans import ChatPlan, chat_plans
from service.web.openai.requests import ChatRequest
from service.web.openapi import generation
from service.web.schemas.generate import TokenLogprob
from service.web.state import serving_of

router = APIRouter(route_class=CountedRoute, tags=["openai"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    summary="Answer a conversation",
    responses=generation(
        "The answers; with `stream`, events with what one or more steps added to an answer, then `[DONE]`. An event is "
        "a `chat.completion.chunk`, with `delta` for `message`; an answer's last has `finish_reason` and `metrics`.",
        ChatCompletionChunk,
    ),
)
async def chat(body: ChatRequest, http: HTTPRequest) -> Response:
    """Answer a conversation `n` times."""
    serving = serving_of(http)
    with serving.metrics.counting_refusals(NO_VARIANT):
        variant = serving.models.variant_of(body.model)
    id_ = f"chatcmpl-{uuid4().hex}"
    with serving.metrics.counting_refusals(variant):
        plan = await chat_plans(id_, body, variant, serving, http.state.received_s, receive=http.receive)
    head = head_of(id_, "chat.completion.chunk" if body.stream else "chat.completion", variant, serving.models)
    choices = Choices(plan.plans, serving)
    dialect = _Dialect(head, choices.runs, plan, shows_logprobs=body.logprobs, tokenizer=serving.tokenizer)
    reply = Reply(choices, dialect, body, always_usage=serving.settings.always_usage)
    if body.stream:
        return streamed(reply.events, http, choices.close)
    return await answered(reply.answer, http, choices.close)


class _Dialect:
    def __init__(
        self,
        head: dict[str, Any],
        runs: Sequence[Run],
        plan: ChatPlan,
        *,
        shows_logprobs: bool,
        tokenizer: TokenizerLike,
    ) -> None:
        self._head = head
        self._runs = runs
        self._plan = plan
        self._shows_logprobs = shows_logprobs
        self._tokenizer = tokenizer
        self._begun: set[int] = set()
        self._answering = [plan.answering() for _ in runs]
        self.is_plain = plan.use is None and plan.is_opened is None

    def event(self, news: Sequence[New], **usage: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head, choices=[self._piece(*new) for new in news], **usage)

    def answer(self, usage: OpenAIUsage) -> ChatCompletion:
        choices = [self._whole(index, run) for index, run in enumerate(self._runs)]
        return ChatCompletion(**self._head, choices=choices, usage=usage)

    def _piece(self, index: int, piece: Piece, end: FinishReason | None) -> ChatChunkChoice:
        """A choice of an event. The role is sent with the first text, so that no event precedes the first token."""
        answering = self._answering[index]
        content, calls, thought = answering.grown(piece.text, is_last=end is not None)
        said: dict[str, Any] = {} if index in self._begun else {"role": "assistant"}
        if calls:
            said["tool_calls"] = calls
        if thought:
            said |= {"reasoning_content": thought, "reasoning": thought}
        if content or not (calls or thought):
            said["content"] = content
        self._begun.add(index)
        logprobs = self._logprobs(piece.logprobs or ())
        choice = ChatChunkChoice(index=index, delta=ChatDelta(**said), logprobs=logprobs, finish_reason=None)
        if end is not None:
            choice.finish_reason, choice.metrics = end_of(end, answering.num_calls), self._runs[index].times()
        return choice

    def _whole(self, index: int, run: Run) -> ChatChoice:
        answer = run.answer()
        content, calls, thought = whole(self._plan.answering(), answer.text)
        shown: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if thought:
            shown |= {"reasoning_content": thought, "reasoning": thought}
        return ChatChoice(
            index=index,
            message=AssistantMessage(
                role="assistant", content=content if content or not (calls or thought) else None, refusal=None, **shown
            ),
            logprobs=self._logprobs(answer.logprobs),
            finish_reason=end_of(answer.finish_reason, len(calls)),
            metrics=answer.metrics,
        )

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(entries, self._tokenizer) if self._shows_logprobs else None
