"""The event loop's side of an engine: sends requests as commands and passes the engine's news to their streams."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec

from service.engine.api import EngineStats, FinishReason, SamplingParams, Token
from service.engine.messages import Command, Ended, Finish, Gauges, Logprob, News, Scored, Submit, error_of
from service.engine.stream import RequestStream
from service.errors import EngineFailed, OttavaError, QueueFull

Compile = Callable[[str, int], Awaitable[None]]
CountCached = Callable[[list[int], str], Awaitable[int]]

_handles = itertools.count(1)
"""Handles are unique within this process, so that a restarted engine never reuses one."""


class EngineClient:
    """Implements `Engine`, wherever the engine itself runs. Use it on the event loop's thread only.

    Args:
        variant: name of the variant.
        post: sends a command to the engine; must not block.
        compile, count_cached: see `Engine.compile` and `Engine.num_cached`.
        max_waiting: most requests that may queue.
        max_model_len, dtype: see `Engine`.
        is_open: whether the engine accepts commands already; if not, requests are held until `resume`.
    """

    def __init__(
        self,
        variant: str,
        post: Callable[[Command], None],
        compile: Compile,  # noqa: A002 (the protocol's word)
        count_cached: CountCached,
        *,
        max_waiting: int,
        max_model_len: int = 0,
        dtype: str = "",
        is_open: bool = True,
    ) -> None:
        self.variant = variant
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.failure: str | None = None
        self._post = post
        self._compile = compile
        self._count_cached = count_cached
        self.max_waiting = max_waiting
        self._streams: dict[int, RequestStream] = {}
        self._gauges = Gauges()
        self._before = Gauges()
        self._num_sent = 0
        self._is_open = is_open
        self._step_batch_sizes: list[int] = []

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, arrival_s: float | None = None
    ) -> RequestStream:
        """See `Engine.submit`."""
        self.refuse_if_failed()
        self.refuse_if_full(self._num_waiting, self.max_waiting, params.owner)
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        arrival_s = time.perf_counter() if arrival_s is None else arrival_s
        command = Submit(
            self.variant, self._num_sent + 1, next(_handles), request_id, prompt_ids, params, arrival_s, seed
        )
        self._num_sent += 1
        stream = RequestStream(command, self._finish, asyncio.get_running_loop())
        self._streams[command.handle] = stream
        if self._is_open:
            self._post(command)
        return stream

    async def compile(self, rules: str, num_answers: int = 1) -> None:
        """See `Engine.compile`."""
        await self._compile(rules, num_answers)

    async def num_cached(self, prompt_ids: list[int], salt: str) -> int:
        """See `Engine.num_cached`."""
        return await self._count_cached(prompt_ids, salt)

    def stats(self) -> EngineStats:
        gauges, before = self._gauges, self._before
        return EngineStats(
            num_running=gauges.num_running,
            num_waiting=self._num_waiting,
            num_blocks=gauges.num_blocks,
            num_free_blocks=gauges.num_free_blocks,
            num_preemptions=before.num_preemptions + gauges.num_preemptions,
            num_steps=sum(self._step_batch_sizes),
            weight_bytes=gauges.weight_bytes,
            kv_cache_bytes=gauges.kv_cache_bytes,
            step_batch_sizes=tuple(self._step_batch_sizes),
            num_restarts=before.num_restarts + gauges.num_restarts,
            num_graph_steps=before.num_graph_steps + gauges.num_graph_steps,
            num_plain_steps=before.num_plain_steps + gauges.num_plain_steps,
            num_padding_tokens=before.num_padding_tokens + gauges.num_padding_tokens,
            num_late_steps=before.num_late_steps + gauges.num_late_steps,
            num_draft_tokens=before.num_draft_tokens + gauges.num_draft_tokens,
            num_accepted_tokens=before.num_accepted_tokens + gauges.num_accepted_tokens,
        )

    def refuse_if_failed(self) -> None:
        """Raise EngineFailed if the engine has failed for good."""
        if self.failure is not None:
            raise EngineFailed(f"the engine of variant {self.variant!r} has stopped")

    def refuse_if_full(self, num_waiting: int, limit: int, owner: str) -> None:
        """Raise QueueFull if so many requests wait, unless this API key has less than its share of the queue."""
        if num_waiting < limit:
            return
        waiting = (stream.command.params.owner for stream in self._streams.values() if stream.is_waiting)
        num_of = Counter(waiting)
        num_owners = len({*num_of, owner})
        if num_owners == 1 or num_of[owner] >= limit // num_owners:
            raise QueueFull(f"{limit} requests are waiting for variant {self.variant!r}; try again later")

    def receive(self, news: News) -> None:
        """Pass the engine's news to the streams, in order."""
        self._gauges = news.gauges
        if news.num_requests:
            self._count_step(news.num_requests)
        for handle, time_s, num_cached in news.scheduled:
            if (stream := self._streams.get(handle)) is not None:
                stream.first_scheduled_s, stream.num_cached = time_s, num_cached
        for scored in news.scored:
            self._take_scores(scored)
        self._hand_out(news)
        for handle, num_steps, num_rows in news.counted:
            if (stream := self._streams.get(handle)) is not None:
                stream.num_steps, stream.num_rows = num_steps, num_rows
        for ended in news.ended:
            self._end(ended)
        for handle in news.released:
            if (stream := self._streams.pop(handle, None)) is not None:
                stream.release()

    def fail(self, failure: str, error: OttavaError) -> None:
        """Mark the engine as failed for good and end all requests with the error."""
        if self.failure is None:
            self.failure = failure
        self.drop(error)

    def drop(self, error: OttavaError) -> None:
        """End all requests with the error."""
        self._drop(list(self._streams.values()), error)

    def lost(self, error: OttavaError) -> None:
        """End the started requests with the error after the engine died; keep the queued ones for the next engine."""
        self._drop([s for s in self._streams.values() if s.first_scheduled_s is not None or s.is_closed], error)
        self._start_over(num_restarts=1)

    def reopen(self) -> None:
        """Prepare for a new engine after the old one was closed."""
        self.failure = None
        self._start_over(num_restarts=0)

    def resume(self) -> None:
        """Send the queued requests to the engine, which accepts commands from now on."""
        self._is_open = True
        for number, stream in enumerate(self._streams.values(), 1):
            stream.command = msgspec.structs.replace(stream.command, number=number)
            self._post(stream.command)

    def _start_over(self, num_restarts: int) -> None:
        """Keep this engine's counters, to which the next engine's are added."""
        before, gauges = self._before, self._gauges
        self._before = Gauges(
            num_preemptions=before.num_preemptions + gauges.num_preemptions,
            num_restarts=before.num_restarts + gauges.num_restarts + num_restarts,
            num_graph_steps=before.num_graph_steps + gauges.num_graph_steps,
            num_plain_steps=before.num_plain_steps + gauges.num_plain_steps,
            num_padding_tokens=before.num_padding_tokens + gauges.num_padding_tokens,
            num_late_steps=before.num_late_steps + gauges.num_late_steps,
            num_draft_tokens=before.num_draft_tokens + gauges.num_draft_tokens,
            num_accepted_tokens=before.num_accepted_tokens + gauges.num_accepted_tokens,
        )
        self._gauges = Gauges()
        self._num_sent = len(self._streams)
        self._is_open = False

    @property
    def _num_waiting(self) -> int:
        return self._gauges.num_waiting + self._num_sent - self._gauges.num_taken

    def _finish(self, stream: RequestStream, reason: FinishReason) -> None:
        handle = stream.command.handle
        if handle not in self._streams:
            return
        if self._is_open:
            self._post(Finish(self.variant, handle, reason))
        else:
            del self._streams[handle]
            self._num_sent -= 1
            stream.release()

    def _count_step(self, num_requests: int) -> None:
        sizes = self._step_batch_sizes
        if num_requests >= len(sizes):
            sizes.extend([0] * (num_requests + 1 - len(sizes)))
        sizes[num_requests] += 1

    def _hand_out(self, news: News) -> None:
        """Pass each stream its tokens."""
        logprobs, time_s, streams, before = dict(news.logprobs), news.time_s, self._streams, None
        for place, (handle, token_id) in enumerate(zip(news.handles, news.token_ids, strict=True)):
            stream = streams.get(handle)
            if stream is None:
                continue
            found = logprobs.get(place) if logprobs else None
            token = Token(token_id, time_s) if found is None else _token(token_id, time_s, found)
            stream.add(token, None if handle == before else news.num_requests)
            before = handle

    def _take_scores(self, scored: Scored) -> None:
        stream = self._streams.get(scored.handle)
        if stream is not None:
            ids = stream.command.prompt_ids[1:]
            stream.prompt_logprobs = tuple(
                _token(id_, scored.time_s, found) for id_, found in zip(ids, scored.logprobs, strict=True)
            )

    def _end(self, ended: Ended) -> None:
        stream = self._streams.pop(ended.handle, None)
        if stream is None:
            return
        stream.finish_reason, stream.finished_s = ended.reason, ended.time_s
        stream.end(None if ended.fault is None else error_of(ended.fault))
        stream.release()

    def _drop(self, streams: list[RequestStream], error: OttavaError) -> None:
        now_s = time.perf_counter()
        for stream in streams:
            del self._streams[stream.command.handle]
            stream.finish_reason, stream.finished_s = FinishReason.ABORT, now_s
            stream.end(error)
            stream.release()


def _token(token_id: int, time_s: float, found: Logprob) -> Token:
    return Token(token_id, time_s, found.logprob, tuple(found.top))
