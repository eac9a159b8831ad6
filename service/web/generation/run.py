"""Runs one generation on one variant, from submission to its last token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from service.comparison.shadow import Sample
from service.comparison.traffic import Visit
from service.engine.api import FinishReason, Progress, SamplingParams, Token
from service.errors import DeadlineExceeded, OttavaError, QueueFull, QueueTimeout
from service.measures import RunMetrics, measure
from service.settings import BASELINE
from service.telemetry.metrics import ERROR, REJECTED, TIMEOUT, exemplar_of
from service.telemetry.record import RunRecord, current
from service.text.stops import Ending
from service.web.generation.deadlines import Deadlines
from service.web.schemas.generate import Answer, TokenLogprob, TopLogprob, Usage
from service.web.state import Serving

_OWN_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request: variant, prompt ids and parameters.

    shows_logprobs: whether the answer contains log-probabilities; params.logprobs may be set for internal use only.
    ending: what ends the answer's text.
    continues: whether the answer continues the prompt's text, so that a leading space matters.
    route: the route of the request.
    timeout_s: seconds from received_s to the last token; None for the settings' limit.
    is_compared: whether it is part of a comparison and so never sampled for shadow mode.
    """

    id: str
    variant: str
    prompt_ids: list[int]
    params: SamplingParams
    ending: Ending = field(default_factory=Ending)
    shows_logprobs: bool = False
    continues: bool = False
    received_s: float = field(default_factory=time.perf_counter)
    route: str = "/generate"
    is_compared: bool = False
    timeout_s: float | None = None


@dataclass(slots=True)
class Piece:
    """New text and tokens of an answer; the text may lag behind. logprobs: None unless the client asked for them."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None


class Run:
    """A running plan. Iterate `pieces`, then read `answer`; always call `close`, which frees what the run holds.

    Its outcome is counted exactly once: stop, length, abort, timeout, error, or rejected at submission or in the queue.
    """

    def __init__(self, plan: Plan, serving: Serving, visit: Visit | None = None) -> None:
        """Submit the plan as part of a visit, or of a new one if None.

        Raises:
            QueueFull, EngineFailed: as `Engine.submit`; the refusal is counted.
        """
        self.plan = plan
        self.tokens: list[Token] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._sent_s: list[float] = []
        self._serving = serving
        self._metrics = serving.metrics
        self._exemplar = exemplar_of(current.get())
        self._is_counted = False
        self._engine = serving.engines[plan.variant]
        self._visit = serving.visit() if visit is None else visit
        self._has_own_visit = visit is None
        self._submitted_s = time.perf_counter()
        self._late: OttavaError | None = None
        self._timeout_s = serving.settings.request_timeout_s if plan.timeout_s is None else plan.timeout_s
        try:
            with self._metrics.counting_refusals(plan.variant):
                self._stream = self._engine.submit(plan.prompt_ids, plan.params, plan.id, plan.received_s)
        except Exception as error:
            self._leave()
            if isinstance(error, QueueFull):
                error.retry_after_s = self._retry_after_s()
            raise
        self._deadlines = Deadlines(
            self._stream,
            received_s=plan.received_s,
            timeout_s=self._timeout_s,
            queue_timeout_s=serving.settings.queue_timeout_s,
            retry_after_s=self._retry_after_s,
            expire=self._expire,
        )
        # After the submission, so that the engine need not wait while the end of the prompt is decoded.
        try:
            self._output = plan.ending.output(serving.tokenizer, plan.prompt_ids if plan.continues else ())
        except Exception as error:
            self._stream.finish(FinishReason.ABORT)
            self._leave()
            self._count(_outcome(error))
            raise

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what each step added; several steps are merged if their tokens arrived before they were read.

        With the last piece, `finish_reason` is set and `answer` can be called.

        Raises:
            EngineFailed: the engine or this request failed.
            DeadlineExceeded: the run took too long.
            QueueTimeout: it was queued too long.
        """
        try:
            async for tokens in self._stream:
                piece = self._piece(tokens)
                if self._output.is_stopped:
                    self._stream.finish(FinishReason.STOP)
                if self._output.is_stopped or self._is_complete():
                    self._flush(piece)
                    self._end()
                yield piece
            self._raise_if_late()
            if self.finish_reason is None:
                self._end()
        except Exception as error:
            self._count(_outcome(error))
            raise

    def _raise_if_late(self) -> None:
        # A raised exception refers to its frames, and they to this run: kept here or there it would close a cycle.
        late, self._late = self._late, None
        try:
            if late is not None:
                raise late
        finally:
            del late

    def answer(self) -> Answer:
        """The complete answer. Call it after `pieces` has ended."""
        assert self.finish_reason is not None
        num_prompt, num_tokens = len(self.plan.prompt_ids), len(self.tokens)
        return Answer(
            id=self.plan.id,
            variant=self.plan.variant,
            text=self.text,
            token_ids=[token.id for token in self.tokens],
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=num_prompt,
                completion_tokens=num_tokens,
                total_tokens=num_prompt + num_tokens,
            ),
            metrics=self.times(),
            **self._shown_logprobs(),
        )

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer; None if none did."""
        return self._output.found

    @property
    def progress(self) -> Progress:
        """The engine's snapshot of the request."""
        return self._stream.progress

    def prompt_logprobs(self) -> list[TokenLogprob]:
        """The log-probabilities of all prompt tokens but the first, if requested; complete with the first piece."""
        return [_logprob(token) for token in self.progress.prompt_logprobs]

    @property
    def time_left_s(self) -> float:
        """Seconds until the run exceeds its timeout."""
        return self.plan.received_s + self._timeout_s - time.perf_counter()

    async def released(self) -> None:
        """Return once the engine has freed what the request held, which after a stop string is one step later."""
        await self._stream.released()

    def close(self) -> None:
        """Abort the run if it has not finished. Idempotent."""
        self._leave()
        if self.finish_reason is None:
            self.finish_reason = FinishReason.ABORT
            self._stream.finish(FinishReason.ABORT)
            self._count(FinishReason.ABORT)

    def _piece(self, tokens: Sequence[Token]) -> Piece:
        """Add new tokens to the answer, up to the one that completes a stop string."""
        ids = [token.id for token in tokens]
        text, taken = self._output.take(ids)
        new = tokens if taken == len(tokens) else tokens[:taken]
        self.text += text
        self.tokens.extend(new)
        self._sent_s.extend([time.perf_counter()] * taken)
        if taken and taken == len(self.tokens):
            # A third of the calls between the engine's news and the event of a stream, whose client need not wait.
            asyncio.get_running_loop().call_soon(self._observe_first, self._sent_s[:])
        elif taken:
            self._metrics.tokens_sent(self.plan.variant, self._sent_s, taken, self._exemplar)
        return Piece(text, ids if new is tokens else ids[:taken], self._logprobs(new))

    def _observe_first(self, sent_s: Sequence[float]) -> None:
        """Observe the first tokens, which were sent at these times."""
        variant, ttft_s = self.plan.variant, sent_s[0] - self.plan.received_s
        num_prompt, num_cached = len(self.plan.prompt_ids), self.progress.num_cached
        self._metrics.first_token(variant, num_prompt, num_cached, ttft_s, self._exemplar)
        self._metrics.tokens_sent(variant, sent_s, len(sent_s), self._exemplar)

    def _is_complete(self) -> bool:
        """Whether the engine has finished the request normally and all its tokens have been read."""
        if self._stream.finish_reason not in _OWN_ENDS:
            return False
        return len(self.tokens) >= self._stream.progress.num_generated

    def _flush(self, piece: Piece) -> None:
        """Append the text that was held back to the last piece."""
        rest = self._output.flush()
        self.text += rest
        piece.text += rest

    def _logprobs(self, tokens: Sequence[Token]) -> list[TokenLogprob] | None:
        return [_logprob(token) for token in tokens] if self.plan.shows_logprobs else None

    def _shown_logprobs(self) -> dict[str, Any]:
        """The field `logprobs`, only if the client asked for it."""
        return {"logprobs": self._logprobs(self.tokens)} if self.plan.shows_logprobs else {}

    def _end(self) -> None:
        stopped = self._output.is_stopped
        self.finish_reason = FinishReason.STOP if stopped else self.progress.finish_reason or FinishReason.ABORT
        self._visit.note(num_own=0 if self.progress.is_released else 1)
        self._count(self.finish_reason)
        if self.finish_reason != FinishReason.ABORT:
            self._tell(self.finish_reason)

    def _tell(self, reason: FinishReason) -> None:
        """Report the finished run to metrics, recent runs and shadow mode."""
        plan, serving, metrics = self.plan, self._serving, self.times()
        serving.metrics.finished(plan.variant, metrics, self.tokens, self._exemplar)
        serving.recent.add(plan.id, plan.variant, plan.route, reason, metrics)
        has_baseline = serving.why_unready(BASELINE) is None
        if has_baseline and not plan.is_compared and serving.shadow.wants(plan.variant):
            serving.shadow.offer(self._sample())

    def _sample(self) -> Sample:
        """What shadow mode needs for a replay."""
        plan = self.plan
        return Sample(
            plan.id,
            plan.variant,
            plan.prompt_ids,
            replace(plan.params, seed=self._stream.seed),
            self._stream.progress,
            plan.ending,
            plan.prompt_ids if plan.continues else (),
            self.tokens,
            self._submitted_s,
            self._visit.is_contended,
        )

    def _expire(self, error: OttavaError) -> None:
        """End a run that exceeded a timeout; `pieces` then raises the error."""
        if self.finish_reason is None and not self._output.is_stopped:
            self._late = error
            self._stream.finish(FinishReason.ABORT)

    def _retry_after_s(self) -> int:
        return self._serving.pace.retry_after_s(self.plan.variant, self._engine.stats())

    def times(self) -> RunMetrics:
        """The metrics of what has been sent so far."""
        plan = self.plan
        return measure(
            self._stream.progress,
            self.tokens,
            num_prompt=len(plan.prompt_ids),
            received_s=plan.received_s,
            sent_s=self._sent_s,
        )

    def _leave(self) -> None:
        if self._has_own_visit:
            self._visit.leave()

    def _count(self, outcome: str) -> None:
        if not self._is_counted:
            self._is_counted = True
            self._metrics.count(self.plan.variant, outcome)
            self._deadlines.cancel()
            # Breaks a reference cycle, so that the run's tokens are freed at once and not by the garbage collector.
            del self._deadlines
            self._note(outcome)

    def _note(self, outcome: str) -> None:
        """Add the run to the estimate of waiting times and to the record of its HTTP request."""
        ended_s, first_scheduled_s = time.perf_counter(), self._stream.progress.first_scheduled_s
        if first_scheduled_s is not None:
            self._serving.pace.add(self.plan.variant, ended_s - first_scheduled_s)
        record = current.get()
        if record is not None:
            texts = (self._prompt_text(), self.text) if self._serving.settings.log_prompts else (None, None)
            plan = self.plan
            record.runs.append(
                RunRecord(plan.id, plan.variant, outcome, plan.params, plan.received_s, ended_s, self.times(), *texts)
            )

    def _prompt_text(self) -> str:
        decoder = self._serving.tokenizer.detokenizer()
        return "".join(decoder.push(token_id) for token_id in self.plan.prompt_ids) + decoder.flush()


def _outcome(error: Exception) -> str:
    """The label under which `requests_total` counts a run that raised."""
    if isinstance(error, QueueTimeout):
        return REJECTED
    return TIMEOUT if isinstance(error, DeadlineExceeded) else ERROR


def _logprob(token: Token) -> TokenLogprob:
    top = [TopLogprob(id=token_id, logprob=_finite(logprob)) for token_id, logprob in token.top_logprobs]
    return TokenLogprob(id=token.id, logprob=_finite(token.logprob), top=top)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None or logprob == float("-inf") else logprob
