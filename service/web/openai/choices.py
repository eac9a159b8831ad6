"""Runs the n answers to a request of OpenAI's routes concurrently."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple, Protocol

from service.engine.api import FinishReason
from service.web.generation.planning import num_logprobs
from service.web.generation.reply import built
from service.web.generation.run import Piece, Plan, Run
from service.web.generation.sse import MARK, Form
from service.web.model_names import ModelNames
from service.web.openai.answers import OpenAIAnswer, OpenAIUsage, PromptTokensDetails
from service.web.openai.requests import OpenAIRequest, StreamOptions
from service.web.state import Serving


class New(NamedTuple):
    """A new piece of a choice; finish_reason is set with its last piece."""

    choice: int
    piece: Piece
    finish_reason: FinishReason | None


class Choices:
    """One run per plan. Iterate `news`; always call `close`, which frees what the runs hold."""

    def __init__(self, plans: Sequence[Plan], serving: Serving) -> None:
        """Submit all plans, or none. Raises QueueFull or EngineFailed, as `Engine.submit`."""
        self.runs: list[Run] = []
        self._visit = serving.visit()
        try:
            for plan in plans:
                self.runs.append(Run(plan, serving, self._visit))
        except Exception:
            self.close()
            raise

    async def news(self) -> AsyncGenerator[New, None]:
        """Yield the pieces of all choices as they arrive. Raises the first exception of a run."""
        if len(self.runs) == 1:
            run = self.runs[0]
            async for piece in run.pieces():
                yield New(0, piece, run.finish_reason)
            return
        news: asyncio.Queue[New | int] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(index, run, news)) for index, run in enumerate(self.runs)]
        num_left = len(pumps)
        try:
            while num_left:
                new = await news.get()
                if isinstance(new, int):
                    num_left -= 1
                    await pumps[new]
                else:
                    yield new
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def close(self) -> None:
        """Free what the runs still hold. Idempotent."""
        self._visit.leave()
        for run in self.runs:
            run.close()


def _num_logprobs(run: Run) -> int:
    """Log-probabilities in a run's answer, at most."""
    return num_logprobs(run.plan.params, len(run.plan.prompt_ids))


async def _pump(index: int, run: Run, news: asyncio.Queue[New | int]) -> None:
    """Queue the pieces of a run, then its index when it has ended or raised."""
    try:
        async for piece in run.pieces():
            news.put_nowait(New(index, piece, run.finish_reason))
    finally:
        news.put_nowait(index)


def head_of(id_: str, kind: str, variant: str, models: ModelNames) -> dict[str, Any]:
    """The fields shared by all events of an answer."""
    return {
        "id": id_,
        "object": kind,
        "created": int(time.time()),
        "model": models.full_name(variant),
        "system_fingerprint": models.fingerprint(variant),
    }


class Dialect(Protocol):
    """How a route formats events and answers.

    is_plain: whether the text of an event is what the piece holds.
    """

    is_plain: bool

    def event(self, news: Sequence[New], **usage: Any) -> OpenAIAnswer: ...

    def answer(self, usage: OpenAIUsage) -> OpenAIAnswer: ...


class Reply:
    """Formats the choices as events or as a whole answer.

    Args:
        body: the request; in the usage, a prompt counts once for its n choices.
        always_usage: whether a stream ends with the usage even if the request does not ask for it.
    """

    def __init__(self, choices: Choices, dialect: Dialect, body: OpenAIRequest, *, always_usage: bool) -> None:
        self._choices = choices
        self._dialect = dialect
        self._options = body.stream_options or StreamOptions()
        self._has_usage = self._options.include_usage or always_usage
        self._n = body.n
        self._counts_answers = 0 not in (body.max_tokens, body.max_completion_tokens)
        self._num_told = 0
        self._forms: dict[int, Form | None] = {}

    async def events(self) -> AsyncGenerator[OpenAIAnswer | bytes, None]:
        """Yield an event per piece of each choice, then, if requested, one with the usage."""
        usage: dict[str, OpenAIUsage | None] = {"usage": None} if self._has_usage else {}
        async with aclosing(self._choices.news()) as news:
            async for new in news:
                self._num_told += len(new.piece.token_ids)
                if usage and self._options.continuous_usage_stats:
                    usage = {"usage": self._usage()}
                is_first = new.choice not in self._forms
                form = self._form_of(new, usage)
                if form is not None:
                    yield form.event(new.piece.text)
                    continue
                # The first event of a choice has the log-probabilities of an echoed prompt.
                num_built = _num_logprobs(self._choices.runs[new.choice]) if is_first else 0
                yield await built(partial(self._dialect.event, [new], **usage), num_built)
        if usage:
            yield self._dialect.event([], usage=self._usage())

    async def answer(self) -> OpenAIAnswer:
        """The whole answer."""
        async with aclosing(self._choices.news()) as news:
            async for new in news:
                self._num_told += len(new.piece.token_ids)
        usage = self._usage()
        return await built(lambda: self._dialect.answer(usage), sum(map(_num_logprobs, self._choices.runs)))

    def _form_of(self, new: New, usage: dict[str, OpenAIUsage | None]) -> Form | None:
        """The form of an event with nothing but new text, as are all but a choice's first and last; else None."""
        is_first = new.choice not in self._forms
        form = self._forms.setdefault(new.choice, None)
        has_more = new.finish_reason is not None or new.piece.logprobs is not None or usage.get("usage") is not None
        if is_first or has_more or not (self._counts_answers and self._dialect.is_plain):
            return None
        if form is None:
            like = New(new.choice, Piece(MARK, []), None)
            form = self._forms[new.choice] = Form(self._dialect.event([like], **usage), MARK)
        return form

    def _usage(self) -> OpenAIUsage:
        runs = self._choices.runs[:: self._n]
        num_prompt = sum(len(run.plan.prompt_ids) for run in runs)
        num_generated = self._num_told if self._counts_answers else 0
        return OpenAIUsage(
            prompt_tokens=num_prompt,
            completion_tokens=num_generated,
            total_tokens=num_prompt + num_generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(run.progress.num_cached for run in runs)),
        )
