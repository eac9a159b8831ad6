"""POST /generate: one prompt, one answer or a stream, and optionally a comparison with the baseline."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive

from service.comparison.compare import agreement, speedup
from service.errors import InvalidRequest
from service.settings import BASELINE
from service.telemetry.metrics import NO_VARIANT
from service.web.failures import CountedRoute
from service.web.generation.planning import (
    Room,
    allowed_timeout,
    chat_ids,
    ending_of,
    fitting,
    known_ids,
    num_logprobs,
    refuse_dear,
    sampling_params,
    text_ids,
)
from service.web.generation.reply import answered, built, streamed
from service.web.generation.rules import compiled_rules
from service.web.generation.run import Piece, Plan, Run
from service.web.generation.sse import MARK, Form
from service.web.generation.tool_use import (
    Answering,
    Told,
    ToolUse,
    end_of,
    shown_messages,
    shown_tools,
    tool_use,
    whole,
)
from service.web.openapi import generation
from service.web.schemas.generate import Answer, Delta, GenerateRequest, GenerateResponse
from service.web.state import Serving, serving_of

NO_IDS = [-1]
"""A placeholder for the ids that change; see `Form`."""

router = APIRouter(route_class=CountedRoute, tags=["generation"])


@router.post(
    "/generate",
    response_model=GenerateResponse,
    summary="Generate text",
    responses=generation(
        "The answer; with `stream`, a `Delta` per one or more steps, then the whole answer, then `[DONE]`.",
        Delta,
        GenerateResponse,
    ),
)
async def generate(body: GenerateRequest, http: HTTPRequest) -> Response:
    """Continue a prompt with one variant. `compare` also runs it on the fp16 baseline, after the first run."""
    serving = serving_of(http)
    variant = serving.default_variant if body.variant is None else body.variant
    with serving.metrics.counting_refusals(variant if variant in serving.engines else NO_VARIANT):
        use, plan = await make_plan(body, variant, serving, http.state.received_s, http.receive)
    job = Job(plan, use, body.compare, serving)
    if body.stream:
        return streamed(job.events, http, job.close)
    return await answered(job.answer, http, job.close)


async def make_plan(
    body: GenerateRequest, variant: str, serving: Serving, received_s: float, receive: Receive | None = None
) -> tuple[ToolUse | None, Plan]:
    """Check a body; returns how its answer may call tools, and the plan. receive: as in `Compiling.compile`.

    Raises:
        InvalidRequest: a value is out of range, or `compare` is not possible; also as `tool_use`, `shown_messages`,
            `call_grammar` and `Engine.compile`.
        PromptTooLong: as `fitting`.
        UnknownVariant, NotReady, EngineFailed: as `Serving.engine`.
    """
    engines = [serving.engine(variant)]
    if body.compare:
        _require_baseline(variant, serving)
        engines.append(serving.engine(BASELINE))
        serving.count_answers(len(engines), "compare")
    use = tool_use(body, serving.tokenizer)
    prompt_ids = await _prompt_ids(body, use, serving)
    room = Room(len(prompt_ids), min(engine.max_model_len for engine in engines), body.prompt_field)
    asked = body.max_tokens if "max_tokens" in body.model_fields_set else None
    max_tokens = fitting(asked, body.max_tokens, room, serving.settings)
    # A comparison needs the chosen tokens' log-probabilities.
    logprobs = 0 if body.logprobs is None and body.compare else body.logprobs
    params = sampling_params(body, serving, max_tokens, logprobs=logprobs)
    timeout_s = allowed_timeout(body.timeout_s, serving.settings)
    grammar = await compiled_rules(
        body, None, use, serving, engines, until_s=received_s + timeout_s, timeout_s=timeout_s, receive=receive
    )
    if grammar is not None:
        params = replace(params, grammar=grammar)
    refuse_dear(len(engines) * num_logprobs(params, len(prompt_ids)), len(engines), serving.settings)
    if body.compare:
        # Both runs draw the same numbers, and start from as much of the prompt.
        params = replace(
            params,
            seed=secrets.randbits(32) if body.seed is None else body.seed,
            max_cached=min([await engine.num_cached(prompt_ids, params.salt) for engine in engines]),
        )
    return use, Plan(
        id=f"gen-{uuid4().hex}",
        variant=variant,
        prompt_ids=prompt_ids,
        params=params,
        ending=ending_of(body, serving.tokenizer, () if use is None else use.format.markers, grammar),
        shows_logprobs=body.logprobs is not None,
        continues=not body.opens_a_turn,
        received_s=received_s,
        is_compared=body.compare,
        timeout_s=timeout_s,
    )


class Job:
    """The run of a /generate request and, for a comparison, the baseline's run after it."""

    def __init__(self, plan: Plan, use: ToolUse | None, compare: bool, serving: Serving) -> None:
        """Submit the plan. Raises QueueFull or EngineFailed, as `Engine.submit`."""
        self._serving = serving
        self._use = use
        self._compare = compare
        self._visit = serving.visit()
        self._runs: list[Run] = []
        try:
            self._start(plan)
        except Exception:
            self.close()
            raise

    async def events(self) -> AsyncGenerator[Delta | bytes | GenerateResponse, None]:
        """Yield what each step of each run added, then the whole answer. Raises as `Run` and `Run.pieces`."""
        first = self._runs[0]
        async for event in _deltas(first, self._use):
            yield event
        num_asked = num_logprobs(first.plan.params, 0)
        answer = await built(lambda: GenerateResponse(**_fields(self._answer(first))), num_asked)
        if self._compare:
            await first.released()
            second = self._start(
                replace(
                    first.plan,
                    id=f"{first.plan.id}-baseline",
                    variant=BASELINE,
                    params=replace(first.plan.params, max_cached=first.progress.num_cached),
                    received_s=time.perf_counter(),
                    timeout_s=first.time_left_s,
                )
            )
            async for event in _deltas(second, self._use):
                yield event
            answers = await built(lambda: (self._answer(first), self._answer(second)), 2 * num_asked)
            answer = self._compared(first, second, *answers)
        yield answer

    async def answer(self) -> GenerateResponse:
        """The whole answer. Raises as `events`."""
        async with aclosing(self.events()) as events:
            async for item in events:
                last = item
        assert isinstance(last, GenerateResponse)
        return last

    def close(self) -> None:
        """Free what the runs still hold. Idempotent."""
        self._visit.leave()
        for run in self._runs:
            run.close()

    def _start(self, plan: Plan) -> Run:
        self._runs.append(Run(plan, self._serving, self._visit))
        return self._runs[-1]

    def _answer(self, run: Run) -> Answer:
        """The run's answer, its calls of tools apart from its text."""
        answer = run.answer()
        if self._use is None:
            return answer
        text, calls, _ = whole(Answering(self._use), answer.text)
        shown: dict[str, object] = {"tool_calls": calls} if calls else {}
        return answer.model_copy(
            update={"text": text, "finish_reason": end_of(answer.finish_reason, len(calls)), **shown}
        )

    def _compared(self, first: Run, second: Run, answer: Answer, baseline: Answer) -> GenerateResponse:
        faster = speedup(answer.metrics, baseline.metrics)
        alike = agreement(first.tokens, second.tokens)
        contended = self._visit.is_contended
        unequal = first.progress.num_cached != second.progress.num_cached
        self._serving.comparisons.add(
            "compare", first.plan.variant, faster, alike, is_contended=contended, is_unequal=unequal
        )
        return GenerateResponse(
            **_fields(answer), baseline=baseline, speedup=faster, agreement=alike, contended=contended
        )


async def _deltas(run: Run, use: ToolUse | None) -> AsyncIterator[Delta | bytes]:
    """An event for each piece of a run. Raises as `Run.pieces`."""
    form = Form(_delta(run, Piece(MARK, NO_IDS), Told(MARK, [])), MARK, NO_IDS)
    answering = Answering(use)
    async for piece in run.pieces():
        told = answering.grown(piece.text, is_last=run.finish_reason is not None)
        is_plain = piece.logprobs is None and not told.calls
        yield form.event(told.content, piece.token_ids) if is_plain else _delta(run, piece, told)


def _delta(run: Run, piece: Piece, told: Told) -> Delta:
    shown: dict[str, Any] = {} if piece.logprobs is None else {"logprobs": piece.logprobs}
    if told.calls:
        shown["tool_calls"] = told.calls
    return Delta(id=run.plan.id, variant=run.plan.variant, text=told.content, token_ids=piece.token_ids, **shown)


def _fields(answer: Answer) -> dict[str, Any]:
    """The fields that are set, so that `logprobs` stays out unless the client asked for it."""
    return {name: getattr(answer, name) for name in answer.model_fields_set}


def _require_baseline(variant: str, serving: Serving) -> None:
    if variant == BASELINE:
        raise InvalidRequest(
            f"`compare` is true, but variant {BASELINE!r} is the baseline itself; "
            "ask for another variant or leave out `compare`",
            "compare",
        )
    if BASELINE not in serving.engines:
        raise InvalidRequest(
            f"`compare` is true, but no {BASELINE!r} variant is served here; leave out `compare`, "
            f"or start the server with --variants {variant},{BASELINE}",
            "compare",
        )


async def _prompt_ids(body: GenerateRequest, use: ToolUse | None, serving: Serving) -> list[int]:
    """The token ids of the prompt, whichever field it was sent in."""
    if body.prompt_ids is not None:
        return known_ids(body.prompt_ids, serving, "prompt_ids")
    if body.messages is not None:
        messages = shown_messages(body.messages, serving.tokenizer)
        return await chat_ids(messages, serving, tools=shown_tools(body, use))
    return await text_ids(body.prompt or "", serving, "prompt")
