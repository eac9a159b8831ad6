"""An engine without a model: deterministic answers, delays and failures on demand, and a record of what it held."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from service.engine.api import EngineStats, FinishReason, SamplingParams, Token
from service.engine.request import Request
from service.errors import EngineFailed, QueueFull

EOS = 0
NUM_BLOCKS = 100


class ByteTokenizer:
    """One token per UTF-8 byte; byte 0 ends an answer and gives no text."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def apply_chat(self, messages: Sequence[dict[str, str]], is_open: bool = True) -> list[int]:
        text = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return self.encode(text[:-1] if is_open and messages[-1]["role"] == "assistant" else text)

    def token_text(self, token_id: int) -> str:
        return "<eos>" if token_id == EOS else chr(token_id) if token_id < 128 else f"bytes:\\x{token_id:02x}"

    def token_bytes(self, token_id: int) -> bytes:
        return b"<eos>" if token_id == EOS else bytes([token_id])

    def decoder(self, context: Sequence[int] = ()) -> ByteDecoder:
        return ByteDecoder()


class ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id == EOS else self._decoder.decode(bytes([token_id]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


@dataclass(eq=False)
class FakeStream:
    request: Request
    engine: FakeEngine
    queue: asyncio.Queue[list[Token] | EngineFailed | None] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None
    is_closed: bool = False

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        while not self.is_closed:
            item = await self.queue.get()
            if isinstance(item, EngineFailed):
                raise item
            if item is None:
                return
            yield item

    def finish(self, reason: FinishReason) -> None:
        if not (self.is_closed or self.request.is_finished):
            self.is_closed = True
            self.queue.put_nowait(None)
            if self.task is not None:
                self.task.cancel()
            delay_s = self.engine.release_delay_s
            if delay_s:
                asyncio.get_running_loop().call_later(delay_s, self.engine.release, self, reason)
            else:
                self.engine.release(self, reason)


class FakeEngine:
    """Answers `reply` byte by byte, then EOS. All engines of one `log` share its event order.

    delay_s: time of a step. fail_at: tokens after which a request's step raises and the engine stops.
    logprob: of every chosen token. tokens_per_step: how many come at once.
    release_delay_s: from `finish` to when the request is gone, as in an engine that notices a step later.
    """

    dtype = "float32"

    def __init__(
        self,
        variant: str,
        reply: str | Callable[[list[int], SamplingParams], str] = "hello",
        *,
        max_model_len: int = 64,
        delay_s: float = 0.0,
        fail_at: int | None = None,
        max_waiting: int = 1000,
        logprob: float = -0.5,
        tokens_per_step: int = 1,
        release_delay_s: float = 0.0,
        log: list[tuple[str, str]] | None = None,
    ) -> None:
        self.variant = variant
        self.reply = reply
        self.max_model_len = max_model_len
        self.delay_s = delay_s
        self.fail_at = fail_at
        self.max_waiting = max_waiting
        self.logprob = logprob
        self.tokens_per_step = tokens_per_step
        self.release_delay_s = release_delay_s
        self.log = log if log is not None else []
        self.active: set[FakeStream] = set()
        self.submitted: list[Request] = []
        self.freed: list[Request] = []
        self.failure: BaseException | None = None
        self.num_steps = 0

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, arrival_s: float | None = None
    ) -> FakeStream:
        if self.failure is not None:
            raise EngineFailed("the engine has stopped")
        if len(self.active) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests are waiting; try again later")
        arrival_s = time.perf_counter() if arrival_s is None else arrival_s
        request = Request(request_id, prompt_ids, params, arrival_s, params.seed or 0)
        stream = FakeStream(request, self)
        self.active.add(stream)
        self.submitted.append(request)
        self.log.append(("start", self.variant))
        stream.task = asyncio.ensure_future(self._generate(stream))
        return stream

    def release(self, stream: FakeStream, reason: FinishReason) -> None:
        stream.request.finish_reason = reason
        stream.request.finished_s = time.perf_counter()
        self.active.remove(stream)
        self.freed.append(stream.request)
        self.log.append(("end", self.variant))

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.active),
            num_waiting=0,
            num_blocks=NUM_BLOCKS,
            num_free_blocks=NUM_BLOCKS - len(self.active),
            num_preemptions=2,
            num_steps=self.num_steps,
            weight_bytes=1000,
            kv_cache_bytes=2000,
            step_batch_sizes=(0, self.num_steps),
        )

    def _ids(self, request: Request) -> tuple[list[int], FinishReason]:
        reply = self.reply if isinstance(self.reply, str) else self.reply(request.prompt_ids, request.params)
        ids, limit = list(reply.encode()), request.params.max_tokens
        if request.params.ignore_eos:
            ids = (ids * (limit // len(ids) + 1))[:limit]
        else:
            ids.append(EOS)
        return (
            (ids[:limit], FinishReason.STOP)
            if len(ids[:limit]) == len(ids) and not request.params.ignore_eos
            else (
                ids[:limit],
                FinishReason.LENGTH,
            )
        )

    async def _generate(self, stream: FakeStream) -> None:
        request = stream.request
        ids, reason = self._ids(request)
        request.first_scheduled_s = time.perf_counter()
        request.prompt_logprobs = self._scores(request)
        for start in range(0, len(ids), self.tokens_per_step):
            await asyncio.sleep(self.delay_s)
            if self.fail_at is not None and start >= self.fail_at:
                self.failure = RuntimeError("secret path /srv/weights")
                self.release(stream, FinishReason.ABORT)
                stream.queue.put_nowait(EngineFailed(f"the engine of variant {self.variant!r} failed"))
                return
            tokens = [self._token(token_id, request.params) for token_id in ids[start : start + self.tokens_per_step]]
            request.output.extend(tokens)
            request.num_steps += 1
            request.num_batch_rows += len(self.active)
            self.num_steps += 1
            stream.queue.put_nowait(tokens)
        self.release(stream, reason)
        stream.queue.put_nowait(None)

    def _scores(self, request: Request) -> list[Token]:
        """Of prompt token n: -n / 4, and as likeliest the bytes before it in the alphabet, each a little likelier."""
        num_top, now_s = request.params.prompt_logprobs, time.perf_counter()
        if num_top is None:
            return []
        return [
            Token(id_, now_s, -place / 4, tuple((abs(id_ - n), -place / 4 + n / 100) for n in range(num_top, 0, -1)))
            for place, id_ in enumerate(request.prompt_ids[1:], 1)
        ]

    def _token(self, token_id: int, params: SamplingParams) -> Token:
        top = () if params.logprobs is None else tuple((token_id + n, -0.5 - n) for n in range(params.logprobs))
        logprob = None if params.logprobs is None else self.logprob
        return Token(token_id, time.perf_counter(), logprob, top)
