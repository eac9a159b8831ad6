"""An engine without a model: deterministic answers, delays and failures on demand, and a record of what it held."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from service.busy_poll import BusyPoll
from service.engine.api import FinishReason, HostInfo, OneToken, RankInfo, Reloaded, SamplingParams
from service.engine.client import EngineClient
from service.engine.grammar import GivenUp, Grammar, Grammars
from service.engine.messages import Command, Ended, Fault, Gauges, Logprob, News, Scored, Sink, Submit, fault_of
from service.errors import EngineFailed
from service.host.server import ServedEngine, nothing_to_reload
from service.text.tools.format import Format

EOS = 0
NUM_BLOCKS = 100
NO_PID = 2**22 + 1
"""Above the largest that Linux gives to a process."""

INFO = HostInfo(
    model="fake",
    family="fake",
    max_model_len=64,
    vocab_size=256,
    variants={},
    one_token=OneToken({}, {}, ""),
    sampling_defaults={},
    device="fake",
    gpu_memory_bytes=None,
    versions={"ottava": "0"},
    tensor_parallel=1,
    ranks=[RankInfo(0, os.getpid(), "cuda:0", {"w8a8": 1000, "fp16": 1000}, {"w8a8": 2000, "fp16": 2000}, 3000)],
)


class ByteTokenizer:
    """One token per UTF-8 byte; byte 0 ends an answer and gives no text."""

    special_ids: Mapping[str, int] = {"<eos>": EOS}
    eos_ids = frozenset({EOS})

    def __init__(
        self, tool_format: Format | None = None, *, has_reasoning: bool = False, takes_later_system: bool = True
    ) -> None:
        self.tool_format = tool_format
        self.has_reasoning = has_reasoning
        self.takes_later_system = takes_later_system

    def encode(self, text: str, adds_special: bool = True) -> list[int]:
        return list(text.encode())

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        is_open: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        head = f"tools:{json.dumps(tools)}\n" if tools else ""
        head += f"variables:{json.dumps(variables)}\n" if variables else ""
        text = "".join(f"{m['role']}:{m['content']}{_beside(m)}\n" for m in messages)
        return self.encode(head + (text[:-1] if is_open and messages[-1]["role"] == "assistant" else text))

    def token_text(self, token_id: int) -> str:
        return "<eos>" if token_id == EOS else chr(token_id) if token_id < 128 else f"bytes:\\x{token_id:02x}"

    def token_bytes(self, token_id: int) -> bytes:
        return b"<eos>" if token_id == EOS else bytes([token_id])

    def detokenizer(self, context: Sequence[int] = (), shown: Collection[str] = ()) -> ByteDetokenizer:
        return ByteDetokenizer("<eos>" if "<eos>" in shown else "")


def _beside(message: Mapping[str, Any]) -> str:
    """What a message has beside role and content."""
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return json.dumps(rest) if rest else ""


class ByteDetokenizer:
    def __init__(self, end: str = "") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = end

    def push(self, token_id: int) -> str:
        return self._end if token_id == EOS else self._decoder.decode(bytes([token_id]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


@dataclass(eq=False)
class FakeRequest:
    """A request as the fake holds it."""

    id: str
    handle: int
    prompt_ids: list[int]
    params: SamplingParams
    arrival_s: float
    seed: int
    output: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    finished_s: float | None = None
    task: asyncio.Task[None] | None = None


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop, on a thread of its own, on which all fakes of this process live."""
    if not _loops:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="fake-engines", daemon=True).start()
        _loops.append(loop)
    return _loops[0]


_loops: list[asyncio.AbstractEventLoop] = []


class FakeEngine:
    """Answers `reply` byte by byte, then EOS. All engines of one `log` share its event order.

    delay_s: time of a step. fail_at: tokens after which a request's step raises and the engine stops.
    logprob: of every chosen token. tokens_per_step: how many come at once.
    release_delay_s: from `finish` to when the request is gone, as in an engine that notices a step later.
    """

    dtype = "float32"
    is_exhausted = True

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
        self._max_waiting = max_waiting
        self.client: EngineClient | None = None
        self.logprob = logprob
        self.tokens_per_step = tokens_per_step
        self.release_delay_s = release_delay_s
        self.log = log if log is not None else []
        self.active: set[FakeRequest] = set()
        self.submitted: list[FakeRequest] = []
        self.freed: list[FakeRequest] = []
        self.failed: Future[Exception] = Future()
        self.num_taken = 0
        self.num_steps = 0
        self.sink: Sink = lambda _: None
        self.busy_poll: BusyPoll | None = None

    @property
    def max_waiting(self) -> int:
        return self._max_waiting

    @max_waiting.setter
    def max_waiting(self, limit: int) -> None:
        self._max_waiting = limit
        if self.client is not None:
            self.client.max_waiting = limit

    @property
    def failure(self) -> Exception | None:
        return self.failed.result() if self.failed.done() else None

    def fail(self, error: Exception) -> None:
        """Fail for good."""
        self.failed.set_result(error)

    def attach(self, client: EngineClient) -> None:
        """Let the web's side of this engine refuse by the same limit."""
        self.client = client
        client.max_waiting = self._max_waiting

    # What `service.host.server` asks of an engine.

    def put(self, command: Command) -> None:
        _loop().call_soon_threadsafe(self._take, command)

    @property
    def has_work(self) -> bool:
        return bool(self.active)

    def serve(self, sink: Sink, busy_poll: BusyPoll | None = None) -> None:
        self.sink = sink
        self.busy_poll = busy_poll

    def count_cached(self, prompt_ids: list[int], salt: str) -> int:
        return 0

    def news(self) -> News:
        return News(
            self.variant,
            Gauges(
                num_taken=self.num_taken,
                num_running=len(self.active),
                num_blocks=NUM_BLOCKS,
                num_free_blocks=NUM_BLOCKS - len(self.active),
                num_preemptions=2,
                num_late_steps=3,
                weight_bytes=1000,
                kv_cache_bytes=2000,
            ),
        )

    def stop(self, timeout_s: float = 0.0) -> None:
        """End everything that runs, as a host that is closed does."""
        _loop().call_soon_threadsafe(self._stop)

    def _take(self, command: Command) -> None:
        if isinstance(command, Submit):
            self._submit(command)
            return
        request = next((each for each in self.active if each.handle == command.handle), None)
        if request is None:
            return
        if request.task is not None:
            request.task.cancel()
        if self.release_delay_s:
            _loop().call_later(self.release_delay_s, self._finish, request, command.reason)
        else:
            self._finish(request, command.reason)

    def _submit(self, command: Submit) -> None:
        self.num_taken = command.number
        refusal = None
        if self.failed.done():
            refusal = EngineFailed("the engine has stopped")
        if refusal is not None:
            self._tell(ended=[Ended(command.handle, FinishReason.ABORT, time.perf_counter(), fault_of(refusal))])
            return
        request = FakeRequest(
            command.request_id, command.handle, command.prompt_ids, command.params, command.arrival_s, command.seed
        )
        self.active.add(request)
        self.submitted.append(request)
        self.log.append(("start", self.variant))
        request.task = _loop().create_task(self._generate(request))

    def _finish(self, request: FakeRequest, reason: FinishReason) -> None:
        if request in self.active:
            self.release(request, reason)
            self._tell(released=[request.handle])

    def _stop(self) -> None:
        for request in list(self.active):
            if request.task is not None:
                request.task.cancel()
            self.release(request, FinishReason.ABORT)

    def release(self, request: FakeRequest, reason: FinishReason) -> None:
        request.finish_reason, request.finished_s = reason, time.perf_counter()
        self.active.remove(request)
        self.freed.append(request)
        self.log.append(("end", self.variant))

    def _tell(self, **news: object) -> None:
        told = self.news()
        for name, value in news.items():
            setattr(told, name, value)
        self.sink(told)

    def _ids(self, request: FakeRequest) -> tuple[list[int], FinishReason]:
        reply = self.reply if isinstance(self.reply, str) else self.reply(request.prompt_ids, request.params)
        ids, limit = list(reply.encode()), request.params.max_tokens
        if request.params.ignore_eos:
            return (ids * (limit // len(ids) + 1))[:limit], FinishReason.LENGTH
        ids.append(EOS)
        return ids[:limit], FinishReason.STOP if len(ids) <= limit else FinishReason.LENGTH

    async def _generate(self, request: FakeRequest) -> None:
        ids, reason = self._ids(request)
        self._tell(scheduled=[(request.handle, time.perf_counter(), 0)])
        for start in range(0, len(ids), self.tokens_per_step):
            await asyncio.sleep(self.delay_s)
            if self.fail_at is not None and start >= self.fail_at:
                self._fail(request)
                return
            self._step(request, ids[start : start + self.tokens_per_step], reason, start + self.tokens_per_step)

    def _step(self, request: FakeRequest, ids: list[int], reason: FinishReason, num_done: int) -> None:
        now_s, is_first = time.perf_counter(), not request.output
        request.output.extend(ids)
        self.num_steps += 1
        ended = []
        num_active = len(self.active)
        if num_done >= len(self._ids(request)[0]):
            self.release(request, reason)
            ended = [Ended(request.handle, reason, now_s)]
        self._tell(
            num_requests=num_active,
            time_s=now_s,
            handles=[request.handle] * len(ids),
            token_ids=ids,
            logprobs=self._logprobs(ids, request.params),
            scored=[self._scores(request, now_s)] if is_first and request.params.prompt_logprobs is not None else [],
            ended=ended,
        )

    def _fail(self, request: FakeRequest) -> None:
        error = RuntimeError("secret path /srv/weights")
        self.release(request, FinishReason.ABORT)
        fault = fault_of(EngineFailed(f"the engine of variant {self.variant!r} failed"))
        self._tell(ended=[Ended(request.handle, FinishReason.ABORT, time.perf_counter(), fault)])
        if not self.failed.done():
            self.failed.set_result(error)

    def _scores(self, request: FakeRequest, now_s: float) -> Scored:
        """Of prompt token n: -n / 4, and as likeliest the bytes before it in the alphabet, each a little likelier."""
        num_top = request.params.prompt_logprobs or 0
        return Scored(
            request.handle,
            now_s,
            [
                Logprob(-place / 4, [(abs(id_ - n), -place / 4 + n / 100) for n in range(num_top, 0, -1)])
                for place, id_ in enumerate(request.prompt_ids[1:], 1)
            ],
        )

    def _logprobs(self, ids: list[int], params: SamplingParams) -> list[tuple[int, Logprob]]:
        if params.logprobs is None:
            return []
        return [
            (place, Logprob(self.logprob, [(id_ + n, -0.5 - n) for n in range(params.logprobs)]))
            for place, id_ in enumerate(ids)
        ]


@dataclass
class FakeGrammars:
    """Takes any rules; `compiled` holds them. refuse: raised instead."""

    compiled: list[str] = field(default_factory=list)
    refuse: Exception | None = None

    def compile(self, rules: str, num_answers: int = 1, given_up: GivenUp | None = None) -> Grammar:
        if self.refuse is not None:
            raise self.refuse
        self.compiled.append(rules)
        return FreeGrammar()

    def known(self, rules: str) -> Grammar | None:
        return FreeGrammar() if rules in self.compiled else None

    def close(self) -> None:
        pass


class FreeGrammar:
    is_ready = True
    mask_s = 0.0

    def matcher(self) -> FreeGrammar:
        return self

    def allowed(self) -> bytes:
        return b"\xff" * 32

    def accept(self, token_id: int) -> None:
        pass


class OwnedEngine(ServedEngine, Protocol):
    """An engine that ends with its host: a fake, or a loop over a scripted runner."""

    def stop(self, timeout_s: float = ...) -> None: ...


@dataclass
class FakeHost:
    """What `service.host.server` asks of a host, over fake engines."""

    engines: Mapping[str, OwnedEngine]
    check: Callable[[], Mapping[str, str]] = dict
    reload: Callable[[str | None], Reloaded] = nothing_to_reload
    described: HostInfo = INFO
    grammars: Grammars = field(default_factory=FakeGrammars)
    tokenizer_folder: Path = Path("fake")
    busy_poll_s: float = 0.0

    def info(self) -> HostInfo:
        return self.described

    def self_check(self) -> Mapping[str, str]:
        return self.check()

    def stop(self, timeout_s: float = 10.0) -> None:
        for engine in self.engines.values():
            engine.stop(timeout_s)


def fault(error: Exception) -> Fault:
    return fault_of(error)
