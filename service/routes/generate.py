"""POST /generate: one prompt, one answer or a stream, and on request the baseline's answer beside it."""

from __future__ import annotations

import asyncio
import logging
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

from service.compare import agreement, speedup
from service.engine.request import SamplingParams
from service.errors import InvalidRequest, OttavaError, PromptTooLong
from service.metrics import NO_VARIANT
from service.routes.failures import DOCUMENTED_ERRORS, CountedRoute, error_body, internal_error
from service.routes.run import Plan, Run
from service.routes.serving import BASELINE, Serving, serving_of
from service.routes.sse import DONE, ClientGone, EventStream, event, unless_disconnected
from service.schemas import PROMPT_FIELDS, Answer, Delta, GenerateRequest, GenerateResponse

CLIENT_GONE_STATUS = 499
# Encoding a short prompt takes less time than the way to another thread and back.
THREAD_CHARS = 4096

log = logging.getLogger(__name__)
router = APIRouter(route_class=CountedRoute, tags=["generation"])


@router.post(
    "/generate",
    response_model=GenerateResponse,
    summary="Generate text",
    responses={
        200: {
            "description": "The answer; with `stream` one `Delta` per step, then the whole answer, then `[DONE]`.",
            "content": {"text/event-stream": {}},
        },
        **DOCUMENTED_ERRORS,
    },
)
async def generate(body: GenerateRequest, http: HTTPRequest) -> Response:
    """Continue a prompt with one variant. `compare` runs it on the fp16 baseline afterwards, never beside it."""
    serving = serving_of(http)
    variant = serving.default_variant if body.variant is None else body.variant
    with serving.metrics.counting_refusals(variant if variant in serving.engines else NO_VARIANT):
        plan = await make_plan(body, variant, serving, http.state.received_s)
    job = Job(plan, body.compare, serving)
    if body.stream:
        return EventStream(_stream(job, http.state.request_id), job.close)
    try:
        answer = await unless_disconnected(http.receive, _last(job))
    except ClientGone:
        return Response(status_code=CLIENT_GONE_STATUS)
    finally:
        job.close()
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


async def make_plan(body: GenerateRequest, variant: str, serving: Serving, received_s: float) -> Plan:
    """Check everything that can be checked before an engine sees the request.

    Raises:
        InvalidRequest, PromptTooLong, UnknownVariant, NotReady, EngineFailed: with name, value, limit and remedy.
    """
    engines = [serving.engine(variant)]
    if body.compare:
        _require_baseline(variant, serving)
        engines.append(serving.engine(BASELINE))
    prompt_ids = await _prompt_ids(body, serving)
    max_model_len = min(engine.max_model_len for engine in engines)
    seed = secrets.randbits(32) if body.seed is None and body.compare else body.seed
    # A comparison needs the chosen tokens' log-probabilities for itself.
    logprobs = 0 if body.logprobs is None and body.compare else body.logprobs
    return Plan(
        id=f"gen-{uuid4().hex}",
        variant=variant,
        prompt_ids=prompt_ids,
        params=SamplingParams(
            max_tokens=_max_tokens(body, len(prompt_ids), max_model_len),
            temperature=body.temperature,
            top_k=body.top_k if body.top_k < serving.tokenizer.vocab_size else 0,
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            seed=seed,
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
        ),
        stop=tuple(body.stop),
        shows_logprobs=body.logprobs is not None,
        received_s=received_s,
    )


class Job:
    """A /generate request while it is served: its run and, for a comparison, the baseline's after it."""

    def __init__(self, plan: Plan, compare: bool, serving: Serving) -> None:
        """Submit the plan. Raises QueueFull or EngineFailed, by the engine."""
        self._serving = serving
        self._compare = compare
        self._is_closed = False
        self._is_contended = serving.traffic.num_active > 0 or self._num_in_engines() > 0
        serving.traffic.enter()
        self._num_entered = serving.traffic.num_entered
        self._runs: list[Run] = []
        try:
            self._start(plan)
        except Exception:
            self.close()
            raise

    async def events(self) -> AsyncGenerator[Delta | GenerateResponse, None]:
        """What each step of each run added, and last the whole answer. Raises EngineFailed or QueueFull."""
        first = self._runs[0]
        async for delta in first.deltas():
            yield delta
        self._note_contention()
        answer = GenerateResponse(**_fields(first.answer()))
        if self._compare:
            await first.released()
            second = self._start(
                replace(first.plan, id=f"{first.plan.id}-baseline", variant=BASELINE, received_s=time.perf_counter())
            )
            async for delta in second.deltas():
                yield delta
            self._note_contention()
            answer = self._compared(first, second)
        yield answer

    def close(self) -> None:
        """Free what is still held. A second call changes nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._serving.traffic.leave()
            for run in self._runs:
                run.close()

    def _start(self, plan: Plan) -> Run:
        self._runs.append(Run(plan, self._serving))
        return self._runs[-1]

    def _compared(self, first: Run, second: Run) -> GenerateResponse:
        answer, baseline = first.answer(), second.answer()
        faster = speedup(answer.metrics, baseline.metrics)
        alike = agreement(first.tokens, second.tokens)
        self._serving.metrics.compared(first.plan.variant, faster, alike)
        return GenerateResponse(
            **_fields(answer), baseline=baseline, speedup=faster, agreement=alike, contended=self._is_contended
        )

    def _note_contention(self) -> None:
        """Any request that entered since, or that an engine holds beside ours, spoils the times."""
        entered = self._serving.traffic.num_entered != self._num_entered
        num_own = sum(not run.is_released for run in self._runs)
        self._is_contended = self._is_contended or entered or self._num_in_engines() > num_own

    def _num_in_engines(self) -> int:
        stats = [engine.stats() for engine in self._serving.engines.values()]
        return sum(reading.num_running + reading.num_waiting for reading in stats)


def _fields(answer: Answer) -> dict[str, Any]:
    """The fields that were set: `logprobs` is left out unless the client asked."""
    return {name: getattr(answer, name) for name in answer.model_fields_set}


async def _last(job: Job) -> GenerateResponse:
    async with aclosing(job.events()) as events:
        async for item in events:
            last = item
    assert isinstance(last, GenerateResponse)
    return last


async def _stream(job: Job, request_id: str) -> AsyncIterator[bytes]:
    """The job as server-sent events. An error ends the stream without [DONE], so a cut-off answer shows as such."""
    try:
        async with aclosing(job.events()) as events:
            async for item in events:
                yield event(item)
        yield DONE
    except OttavaError as error:
        log.exception("request %s: stream ended early", request_id)
        yield event(error_body(error))
    except Exception:
        log.exception("request %s: stream ended early", request_id)
        yield event(internal_error())


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


async def _prompt_ids(body: GenerateRequest, serving: Serving) -> list[int]:
    """The prompt as token ids, in whichever form it came."""
    tokenizer = serving.tokenizer
    if body.prompt_ids is not None:
        limit = tokenizer.vocab_size - 1
        for token_id in (min(body.prompt_ids, default=0), max(body.prompt_ids, default=0)):
            if not 0 <= token_id <= limit:
                raise InvalidRequest(
                    f"`prompt_ids` holds {token_id}, outside the vocabulary: ids run from 0 to {limit}", "prompt_ids"
                )
        ids, param = body.prompt_ids, "prompt_ids"
    elif body.messages is not None:
        param = "messages"
        messages = [message.model_dump() for message in body.messages]
        ids = await asyncio.to_thread(tokenizer.apply_chat, messages) if messages else []
    else:
        param, text = "prompt", body.prompt or ""
        is_long = len(text) > THREAD_CHARS
        ids = (await asyncio.to_thread(tokenizer.encode, text) if is_long else tokenizer.encode(text)) if text else []
    if not ids:
        raise InvalidRequest(f"`{param}` is empty; send at least one token", param)
    return ids


def _max_tokens(body: GenerateRequest, num_prompt: int, max_model_len: int) -> int:
    """How many tokens may be generated: as asked, or where nothing was asked, at most what is left."""
    room = max_model_len - num_prompt
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {num_prompt} tokens; the context holds {max_model_len}, prompt and answer together; "
            f"shorten the prompt to at most {max_model_len - 1} tokens, or serve with a larger --max-model-len",
            next(name for name in PROMPT_FIELDS if getattr(body, name) is not None),
        )
    if "max_tokens" not in body.model_fields_set:
        return min(body.max_tokens, room)
    if body.max_tokens > room:
        raise InvalidRequest(
            f"`max_tokens` is {body.max_tokens}, but a prompt of {num_prompt} tokens leaves {room} of the context's "
            f"{max_model_len}; the largest possible here is {room}",
            "max_tokens",
        )
    return body.max_tokens
