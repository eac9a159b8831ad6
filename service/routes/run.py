"""One generation on one variant, from submission to its last token; every route is built on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.compare import measure
from service.engine.request import FinishReason, SamplingParams, Token
from service.metrics import ERROR
from service.routes.serving import Serving
from service.schemas import Answer, Delta, TokenLogprob, TopLogprob, Usage
from service.text import StopStrings

RELEASE_POLL_S = 0.001


@dataclass(frozen=True, slots=True)
class Plan:
    """A request that has been checked: what to run, with which ids and parameters.

    shows_logprobs: whether the client asked for what params.logprobs may ask for us.
    """

    id: str
    variant: str
    prompt_ids: list[int]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    shows_logprobs: bool = False
    received_s: float = field(default_factory=time.perf_counter)


class Run:
    """A plan in an engine. Iterate `deltas`, then read `answer`; `close` in any case, which frees what it held.

    Its outcome is counted exactly once: stop, length, abort, error, or rejected at submission.
    """

    def __init__(self, plan: Plan, serving: Serving) -> None:
        """Submit the plan.

        Raises:
            QueueFull, EngineFailed: by the engine; counted.
        """
        self.plan = plan
        self.tokens: list[Token] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._sent_s: list[float] = []
        self._metrics = serving.metrics
        self._is_counted = False
        self._engine = serving.engines[plan.variant]
        self._decoder = serving.tokenizer.decoder()
        self._stops = StopStrings(plan.stop)
        with self._metrics.counting_refusals(plan.variant):
            self._stream = self._engine.submit(plan.prompt_ids, plan.params, plan.id, plan.received_s)

    async def deltas(self) -> AsyncIterator[Delta]:
        """What each step added; the last one may bring text without tokens.

        Raises:
            EngineFailed: a step raised; what was sent before stands.
        """
        try:
            async for tokens in self._stream:
                delta = self._delta(tokens)
                if self._stops.found is not None:
                    self._stream.finish(FinishReason.STOP)
                yield delta
            rest = self._stops.push(self._decoder.flush()) + self._stops.flush()
            if rest:
                self.text += rest
                yield Delta(id=self.plan.id, variant=self.plan.variant, text=rest, token_ids=[])
            self._end()
        except Exception:
            self._count(ERROR)
            raise

    def answer(self) -> Answer:
        """What came out, once `deltas` has ended."""
        assert self.finish_reason is not None
        request, num_tokens = self._stream.request, len(self.tokens)
        return Answer(
            id=self.plan.id,
            variant=self.plan.variant,
            text=self.text,
            token_ids=[token.id for token in self.tokens],
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=len(request.prompt_ids),
                completion_tokens=num_tokens,
                total_tokens=len(request.prompt_ids) + num_tokens,
            ),
            metrics=measure(request, self.tokens, self.plan.received_s, self._sent_s),
            **self._logprobs(self.tokens),
        )

    @property
    def is_released(self) -> bool:
        """The engine holds nothing of the request any more."""
        return self._stream.request.is_finished and self._stream.request.row < 0

    async def released(self) -> None:
        """Return once the engine has let go of the request, which after a stop string is a step later."""
        while not self.is_released and self._engine.failure is None:
            await asyncio.sleep(RELEASE_POLL_S)

    def close(self) -> None:
        """End the run if it is still going. A second call changes nothing."""
        if self.finish_reason is None:
            self.finish_reason = FinishReason.ABORT
            self._stream.finish(FinishReason.ABORT)
            self._count(FinishReason.ABORT)

    def _delta(self, tokens: Sequence[Token]) -> Delta:
        """Take the tokens of a step, up to the one that completes a stop string."""
        text, taken = "", 0
        for token in tokens:
            text += self._stops.push(self._decoder.push(token.id))
            taken += 1
            if self._stops.found is not None:
                break
        new = tokens[:taken]
        self.text += text
        self.tokens.extend(new)
        self._sent_s.extend([time.perf_counter()] * taken)
        if taken:
            self._metrics.tokens_sent(
                self.plan.variant, self._stream.request, self.plan.received_s, self._sent_s, taken
            )
        ids = [token.id for token in new]
        return Delta(id=self.plan.id, variant=self.plan.variant, text=text, token_ids=ids, **self._logprobs(new))

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The field `logprobs`, set only where the client asked for it."""
        return {"logprobs": [_logprob(token) for token in tokens]} if self.plan.shows_logprobs else {}

    def _end(self) -> None:
        stopped = self._stops.found is not None
        self.finish_reason = FinishReason.STOP if stopped else self._stream.request.finish_reason or FinishReason.ABORT
        self._count(self.finish_reason)
        if self.finish_reason != FinishReason.ABORT:
            self._metrics.finished(self.plan.variant, self.answer().metrics, self.tokens)

    def _count(self, outcome: str) -> None:
        if not self._is_counted:
            self._is_counted = True
            self._metrics.count(self.plan.variant, outcome)


def _logprob(token: Token) -> TokenLogprob:
    top = [TopLogprob(id=token_id, logprob=_finite(logprob)) for token_id, logprob in token.top_logprobs]
    return TokenLogprob(id=token.id, logprob=_finite(token.logprob), top=top)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None or logprob == float("-inf") else logprob
