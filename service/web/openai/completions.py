"""POST /v1/completions: continues texts in OpenAI's format."""

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
from service.web.generation.run import Run
from service.web.openai.answers import Completion, CompletionChoice, CompletionLogprobs, OpenAIUsage
from service.web.openai.choices import Choices, New, Reply, head_of
from service.web.openai.logprobs import TextLogprobs, joined
from service.web.openai.plans import Prompt, completion_plans
from service.web.openai.requests import CompletionRequest
from service.web.openapi import generation
from service.web.schemas.generate import TokenLogprob
from service.web.state import serving_of

router = APIRouter(route_class=CountedRoute, tags=["openai"])


@router.post(
    "/v1/completions",
    response_model=Completion,
    summary="Continue texts",
    responses=generation(
        "The answers; with `stream`, such events with what one or more steps added to an answer, then `[DONE]`.",
        Completion,
    ),
)
async def complete(body: CompletionRequest, http: HTTPRequest) -> Response:
    """Continue each prompt `n` times."""
    serving = serving_of(http)
    with serving.metrics.counting_refusals(NO_VARIANT):
        variant = serving.models.variant_of(body.model)
    id_ = f"cmpl-{uuid4().hex}"
    with serving.metrics.counting_refusals(variant):
        prompts, plans = await completion_plans(
            id_, body, variant, serving, http.state.received_s, receive=http.receive
        )
    head = head_of(id_, "text_completion", variant, serving.models)
    choices = Choices(plans, serving)
    texts = [
        _Text(index, run, prompts[index // body.n], body, serving.tokenizer) for index, run in enumerate(choices.runs)
    ]
    reply = Reply(choices, _Dialect(head, texts), body, always_usage=serving.settings.always_usage)
    if body.stream:
        return streamed(reply.events, http, choices.close)
    return await answered(reply.answer, http, choices.close)


class _Dialect:
    is_plain = True

    def __init__(self, head: dict[str, Any], texts: Sequence[_Text]) -> None:
        self._head = head
        self._texts = texts

    def event(self, news: Sequence[New], **usage: Any) -> Completion:
        choices = [self._texts[new.choice].grown(new.piece.text, new.piece.logprobs, new.finish_reason) for new in news]
        return Completion(**self._head, choices=choices, **usage)

    def answer(self, usage: OpenAIUsage) -> Completion:
        return Completion(**self._head, choices=[text.whole() for text in self._texts], usage=usage)


class _Text:
    """Formats one answer: its text, after the prompt if that is echoed."""

    def __init__(self, index: int, run: Run, prompt: Prompt, body: CompletionRequest, tokenizer: TokenizerLike) -> None:
        self._index = index
        self._run = run
        self._echo = prompt.text if body.echo else None
        self._is_silent = 0 in (body.max_tokens, body.max_completion_tokens)
        self._logprobs = (
            None if body.logprobs is None else TextLogprobs(prompt, body.echo, tokenizer, run.plan.ending.shown)
        )
        self._has_begun = False

    def whole(self) -> CompletionChoice:
        """The complete choice, after its run has ended."""
        answer = self._run.answer()
        return self.grown(answer.text, answer.logprobs, self._run.finish_reason)

    def grown(self, text: str, entries: Sequence[TokenLogprob] | None, end: FinishReason | None) -> CompletionChoice:
        """A choice with the new text. The first one begins with an echoed prompt, the last has the finish reason."""
        if self._is_silent:
            text, entries = "", ()
        logprobs = None if self._logprobs is None else self._shaped(self._logprobs, entries or ())
        text = text if self._has_begun or self._echo is None else self._echo + text
        self._has_begun = True
        choice = CompletionChoice(index=self._index, text=text, logprobs=logprobs, finish_reason=None)
        if end is not None:
            # With max_tokens 0 the one generated token is hidden, so it must not show as an end token either.
            choice.finish_reason = FinishReason.LENGTH if self._is_silent else end
            choice.metrics = self._run.times()
        return choice

    def _shaped(self, logprobs: TextLogprobs, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        answer = logprobs.of_answer(entries)
        if self._has_begun or self._echo is None:
            return answer
        return joined(logprobs.of_prompt(self._run.prompt_logprobs()), answer)
