"""Shadow mode: replays a share of answered requests on the idle baseline, only for the metrics."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from service.comparison.compare import agreement, speedup
from service.comparison.tally import Comparisons
from service.comparison.traffic import Traffic, num_in
from service.engine.api import Engine, FinishReason, Progress, SamplingParams, Stream, Token
from service.measures import RunMetrics, measure
from service.telemetry.metrics import ABANDONED, DROPPED, REPLAYED, ServiceMetrics
from service.text.protocols import TokenizerLike
from service.text.stops import Ending

IDLE_POLL_S = 0.01
TOKEN_BYTES = 200
"""Memory of a token of a sample, at most: its id, its time and its log-probability as Python objects."""

MAX_WAITING_BYTES = 32 << 20
"""Most bytes of the samples that wait; the next is dropped."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """A live request that has been answered.

    params: with the seed that was used, so that a sampled answer can agree too.
    ending: what ended its text.   context: tokens that its text continues.   tokens: those sent to the client.
    submitted_s: when it was submitted to the engine.   is_contended: other requests ran at the same time.
    """

    request_id: str
    variant: str
    prompt_ids: list[int]
    params: SamplingParams
    progress: Progress
    ending: Ending
    context: Sequence[int]
    tokens: list[Token]
    submitted_s: float
    is_contended: bool

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, roughly and at most."""
        return TOKEN_BYTES * (len(self.prompt_ids) + len(self.tokens))

    def without_others(self) -> Sample:
        """It without what no comparison needs: log-probabilities of the prompt, and those of tokens not chosen."""
        return replace(
            self,
            params=replace(self.params, prompt_logprobs=None, logprobs=None if self.params.logprobs is None else 0),
            progress=replace(self.progress, prompt_logprobs=()),
            tokens=[msgspec.structs.replace(token, top_logprobs=()) for token in self.tokens],
        )


def engine_times(progress: Progress, tokens: Sequence[Token], num_prompt: int, submitted_s: float) -> RunMetrics:
    """A run's metrics up to when the engine read each token, without network, client and tokenizer."""
    sent_s = [token.time_s for token in tokens]
    return measure(progress, tokens, num_prompt=num_prompt, received_s=submitted_s, sent_s=sent_s)


class Shadow:
    """Replays samples one at a time while nothing else runs.

    Live requests have precedence: when one arrives, the current replay is abandoned and not retried. So long answers
    are abandoned more often than short ones, and a server that is never idle replays nothing.

    Args:
        engines: variant -> engine.
        baseline: the variant to replay on.
        tokenizer: returns the model's tokenizer; called for each replay.
        traffic: counts the live requests.
        comparisons, metrics: receive the results.
        rate: share of finished requests to sample, 0 to 1.
        max_waiting: most queued samples; further ones are dropped.
        draw: returns a uniform number in [0, 1).
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        baseline: str,
        *,
        tokenizer: Callable[[], TokenizerLike],
        traffic: Traffic,
        comparisons: Comparisons,
        metrics: ServiceMetrics,
        rate: float,
        max_waiting: int,
        draw: Callable[[], float] = random.random,  # noqa: S311 (which requests are sampled is no secret)
    ) -> None:
        self._engines = engines
        self._baseline = baseline
        self._tokenizer = tokenizer
        self._traffic = traffic
        self._comparisons = comparisons
        self._metrics = metrics
        self._rate = rate
        self._max_waiting = max_waiting
        self._draw = draw
        self._samples: deque[Sample] = deque()
        self._has_samples = asyncio.Event()
        self._stream: Stream | None = None
        self._replaying: asyncio.Task[None] | None = None
        if self.is_on:
            traffic.on_enter = self.yield_device

    @property
    def is_on(self) -> bool:
        return self._rate > 0

    @property
    def num_waiting(self) -> int:
        return len(self._samples)

    def wants(self, variant: str) -> bool:
        """Draw whether to offer a finished request of this variant."""
        return self.is_on and variant != self._baseline and self._draw() < self._rate

    def offer(self, sample: Sample) -> None:
        """Queue a sample, or drop it if the queue is full."""
        num_bytes = sum(other.num_bytes for other in self._samples) + sample.num_bytes
        if len(self._samples) >= self._max_waiting or num_bytes > MAX_WAITING_BYTES:
            self._metrics.shadowed(sample.variant, DROPPED)
            return
        self._samples.append(sample.without_others())
        self._has_samples.set()

    def yield_device(self) -> None:
        """Abandon the current replay; the device is free after the step in flight."""
        if self._replaying is not None:
            if self._stream is not None:
                self._stream.finish(FinishReason.ABORT)
            self._replaying.cancel()

    async def run(self) -> None:
        """Replay until cancelled, then abandon all samples, so that a shutdown does not wait for replays."""
        try:
            while True:
                await self._until_idle()
                sample = self._samples[0]
                self._replaying = asyncio.create_task(self._replay(sample))
                await asyncio.wait({self._replaying})
                self._settle(sample, self._replaying)
                self._replaying = None
                self._samples.popleft()
                # Not while it waits for the next one.
                del sample
        finally:
            self.yield_device()
            for sample in self._samples:
                self._metrics.shadowed(sample.variant, ABANDONED)
            self._samples.clear()

    async def _until_idle(self) -> None:
        """Wait until a sample is queued, no client's request is active and the engines are empty."""
        while True:
            if not self._samples:
                self._has_samples.clear()
                await self._has_samples.wait()
            elif self._traffic.num_active or num_in(self._engines.values()):
                await asyncio.sleep(IDLE_POLL_S)
            else:
                return

    async def _replay(self, sample: Sample) -> None:
        submitted_s, num_prompt = time.perf_counter(), len(sample.prompt_ids)
        stream = self._engines[self._baseline].submit(
            sample.prompt_ids,
            replace(sample.params, max_cached=sample.progress.num_cached),
            f"{sample.request_id}-shadow",
            submitted_s,
        )
        self._stream = stream
        output = sample.ending.output(self._tokenizer(), sample.context)
        tokens: list[Token] = []
        try:
            async for step in stream:
                _, num_taken = output.take([token.id for token in step])
                tokens.extend(step[:num_taken])
                if output.is_stopped:
                    stream.finish(FinishReason.STOP)
        finally:
            self._stream = None
            stream.finish(FinishReason.ABORT)
        times = engine_times(sample.progress, sample.tokens, num_prompt, sample.submitted_s)
        faster = speedup(times, engine_times(stream.progress, tokens, num_prompt, submitted_s))
        alike = agreement(sample.tokens, tokens)
        self._comparisons.add(
            "shadow",
            sample.variant,
            faster,
            alike,
            is_contended=sample.is_contended,
            is_unequal=sample.progress.num_cached != stream.progress.num_cached,
        )

    def _settle(self, sample: Sample, replay: asyncio.Task[None]) -> None:
        error = None if replay.cancelled() else replay.exception()
        if error is not None:
            # A fault of the baseline must not end shadow mode, and no client waits for this answer.
            log.error("the replay of %s failed: %s", sample.request_id, error, exc_info=error)
        is_done = not replay.cancelled() and error is None
        self._metrics.shadowed(sample.variant, REPLAYED if is_done else ABANDONED)
