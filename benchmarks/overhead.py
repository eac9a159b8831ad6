"""What HTTP costs beside the engine alone: tokens per second of many streams, and time to the first token of one.

    python -m benchmarks.overhead                                    an engine that takes a set time per step, or
    python -m benchmarks.overhead --engine real                      the demo model on this machine, or
    python -m benchmarks.overhead --engine real --shape llama-3.1-8b --requests 200

This process is the web of `ottava serve`: its app, its uvicorn options, its event loop. The engine has a process of its
own (`benchmarks.engine_process`), or with --in-process a thread of this one. The clients are another process
(`benchmarks.overhead_client`), which shares this machine's cores. The engine alone is the same engine, asked through
`Engine.submit` and read by tasks of the same event loop, while the server waits. The ways take turns.

- Streams: --streams requests at once. Tokens per second from the first request's start to the last token, and while
  all of them stream: from the last one's first token to the first one's last. The ratio is that of each round.
- Steps: from the end of one step that all streams took part in to the end of the next, by the engine's own clock.
- Channel: what a step of 256 requests costs the engine's thread beside the step: the results handed out, told and sent.
- First token: requests one after the other, the same ones each way, over a connection that stays open: from the request
  sent to its first event received, less, for the same request, from submission to the first token in the task that
  reads it. The prompt goes as token ids, as the engine gets it, and as text, which the server encodes: what that takes
  is timed before each submission. `GET /health` shows what client, loopback and server take at least.

CPU times are those of this process by its own clock, over the tokens of all rounds. Other work on the machine delays
both processes; `chrt -f 5` before the command puts them in front of it. The last line printed is JSON; the
exit code is 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.engine_process import VARIANT, as_words, open_engine, tokenizer_of
from benchmarks.report import RESULTS, birth_certificate, quantiles, write
from benchmarks.shapes import SHAPES
from service.engine.api import SamplingParams
from service.engine.client import EngineClient
from service.engine.inbox import Inbox
from service.engine.masks import Masks
from service.engine.messages import News, Submit
from service.engine.scheduler import Scheduler, StepResults
from service.engine.supervision import FaultLimits
from service.host.channel.client import HostClient, Link
from service.host.channel.messages import ToEngine
from service.host.channel.process import ProcessLink
from service.host.channel.socket import ThreadEnd, pair
from service.host.local import LocalLink
from service.measures import percentile
from service.settings import Settings
from service.store.calibration import calibration_text
from service.telemetry.logs import configure_logging
from service.text.tokenizer import Tokenizer
from service.web.app import create_app
from service.web.server import Server
from service.web.uvicorn_config import allow_open_files

ALONE, GENERATE, COMPLETIONS, HEALTH = "engine alone", "/generate", "/v1/completions", "/health"
ENCODING = "encoding the text"
FORMS = ("token ids", "text")
RATIO_GOAL, ADDED_MS_GOAL = 0.97, 2.0
STEP_GOAL = 1.05
"""Of the engine's steps when it is asked alone."""

CHANNEL_REQUESTS, CHANNEL_STEPS, CHANNEL_US_GOAL = 256, 1000, 100.0

FIRST_TOKENS = 4
"""Tokens of a request whose first one is timed."""

TURN = 25
"""Such requests that one way sends before the next way's turn."""

VERSIONS = ("fastapi", "starlette", "uvicorn", "h11", "pydantic", "tokenizers")


def main() -> int:
    args = arguments()
    torch.manual_seed(0)
    certificate = birth_certificate(args.commit)
    certificate |= {name: import_module(name).__version__ for name in VERSIONS}
    certificate |= {
        "engine": args.engine,
        "in process": args.in_process,
        "cores": os.cpu_count(),
        "load before": os.getloadavg(),
    }
    certificate["is real-time"] = os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
    settings = settings_of(args)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        # As a server of users does: a line of log for each request, and what it costs.
        configure_logging(settings, nowhere)
        rig = rig_of(args, settings)
        allow_open_files(settings.max_connections)
        with asyncio.Runner(loop_factory=rig.server.config.get_loop_factory()) as runner:
            rows = runner.run(measured(rig, args))
        rows += channel_rows()
    certificate |= {"load after": os.getloadavg(), "event loop": rig.loop_name}
    what = "paced" if args.engine == "paced" else args.shape or "demo"
    name = args.out or RESULTS / f"overhead-{what}-{device_word()}.json"
    write(Path(name), certificate, rows)
    print(table(certificate, rows))
    print(json.dumps(rows))
    return 0 if all(row.get("holds", True) for row in rows) else 1


@dataclass(slots=True)
class Rig:
    """An engine behind its server, and the prompts that all ways send."""

    engine: EngineClient
    server: Server
    tokenizer: Tokenizer
    texts: list[str]
    prompts: list[list[int]]
    loop_name: str = ""


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        port=0,
        variants=(VARIANT,),
        max_num_requests=args.streams,
        max_batched_tokens=max(512, args.streams),
        kv_cache="float",
        # All ways send the same prompts.
        prefix_cache=False,
        in_process=args.in_process,
    )


def rig_of(args: argparse.Namespace, settings: Settings) -> Rig:
    tokenizer = tokenizer_of(args, settings)
    link: Link = (
        LocalLink(partial(open_engine, args, settings))
        if args.in_process
        else ProcessLink(settings, (sys.executable, "-m", "benchmarks.engine_process", as_words(args)))
    )
    host = HostClient(
        (VARIANT,),
        link,
        load_tokenizer=lambda _: tokenizer,
        limits=FaultLimits(),
        max_waiting=settings.max_waiting,
    )
    engine = host.engines[VARIANT]
    return Rig(engine, Server(create_app(host, settings), settings), tokenizer, *prompts_of(tokenizer, args))


def prompts_of(tokenizer: Tokenizer, args: argparse.Namespace) -> tuple[list[str], list[list[int]]]:
    """Texts of about --prompt tokens, each another part of a long text, and their ids."""
    ids = tokenizer.encode(calibration_text(None)[: 100 * args.prompt])
    texts = []
    for number in range(args.streams):
        start = number * (len(ids) - args.prompt) // args.streams
        decoder = tokenizer.detokenizer()
        # A few tokens less than the context was made for: encoded again they may come to a few more.
        texts.append("".join(map(decoder.push, ids[start : start + args.prompt - 8])) + decoder.flush())
    return texts, [tokenizer.encode(text) for text in texts]


async def measured(rig: Rig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of the result."""
    rig.loop_name = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    async with served(rig.server) as port, clients() as ask:
        bench = Bench(rig, args, port, ask)
        await bench.streams(ALONE, args.tokens)
        for path in (GENERATE, COMPLETIONS):
            await bench.streams(path, args.tokens)
        bench.forget()
        for number in range(args.rounds):
            for way in (ALONE, GENERATE, COMPLETIONS):
                await bench.streams(way, args.tokens)
            print(f"round {number + 1} of {args.rounds} is done", file=sys.stderr, flush=True)
        rows = bench.stream_rows()
        if args.requests:
            rows += await bench.first_tokens(args.requests)
        return rows


@asynccontextmanager
async def served(server: Server) -> AsyncIterator[int]:
    """The server's port, once it is ready."""
    serving = asyncio.create_task(server.serve())
    while not server.started or not server.serving.is_ready:
        if serving.done():
            await serving
            raise RuntimeError("the server ended before it was ready")
        await asyncio.sleep(0.01)
    refused = server.serving.host.refused
    if refused:
        raise RuntimeError(f"the self-check refused: {refused}")
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@asynccontextmanager
async def clients() -> AsyncIterator[Ask]:
    """What sends a job to the process of the clients and returns its answer."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.overhead_client"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 28,
        cwd=Path(__file__).parent.parent,
    )
    to, back = process.stdin, process.stdout
    assert to is not None
    assert back is not None

    async def ask(job: dict[str, Any]) -> dict[str, Any]:
        to.write(json.dumps(job).encode() + b"\n")
        line = await back.readline()
        if not line:
            raise RuntimeError("the clients' process has ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    try:
        yield ask
    finally:
        to.close()
        await process.wait()


@dataclass(slots=True)
class Cost:
    """CPU seconds of this process, of the thread of its event loop, and of the clients; cores that others used.

    events: in which the tokens came, and of `/generate` one with the whole answer.
    """

    tokens: int = 0
    process_s: float = 0.0
    loop_s: float = 0.0
    client_s: float = 0.0
    others: list[float] = field(default_factory=list)
    events: int = 0


class Bench:
    """Turns of the ways over one server."""

    def __init__(self, rig: Rig, args: argparse.Namespace, port: int, ask: Ask) -> None:
        self._rig = rig
        self._port = port
        self._ask = ask
        self._streams = args.streams
        self._ended_s: list[float] = []
        self._steps_s: dict[str, list[float]] = defaultdict(list)
        self._watch(rig.engine)
        self._rates: dict[str, list[float]] = {}
        self._full: dict[str, list[float]] = {}
        self._costs: dict[str, Cost] = {}
        self.forget()

    def _watch(self, engine: EngineClient) -> None:
        """Note when each step that all streams took part in was read, by the engine's clock."""
        receive = engine.receive

        def watched(news: News) -> None:
            if len(news.handles) == self._streams:
                self._ended_s.append(news.time_s)
            receive(news)

        engine.receive = watched  # type: ignore[method-assign]

    def forget(self) -> None:
        """Drop what was measured so far."""
        self._steps_s.clear()
        self._rates, self._full, self._costs = defaultdict(list), defaultdict(list), defaultdict(Cost)

    async def streams(self, way: str, num_tokens: int) -> None:
        """One round of all streams at once."""
        clock = Clock()
        self._ended_s.clear()
        if way == ALONE:
            started_s, times = await self._streams_alone(num_tokens)
            client_s = 0.0
        else:
            bodies = [self._body(way, number, num_tokens) for number in range(self._streams)]
            got = await self._ask({"kind": "streams", "port": self._port, "path": way, "bodies": bodies})
            started_s, times, client_s = got["answer"]["started_s"], got["answer"]["tokens_s"], got["cpu_s"]
            self._costs[way].events += got["answer"]["num_events"]
        clock.add_to(self._costs[way], sum(map(len, times)), client_s)
        if any(len(one) != num_tokens for one in times):
            raise RuntimeError(f"{way}: {num_tokens} tokens were asked for, {[len(one) for one in times]} came")
        self._steps_s[way] += [after - before for before, after in itertools.pairwise(self._ended_s)]
        self._rates[way].append(rate(started_s, times))
        self._full[way].append(full_rate(times))

    async def first_tokens(self, count: int) -> list[dict[str, Any]]:
        """Rows of the time to the first token, by turns of every way."""
        took: dict[str, list[float]] = defaultdict(list)
        for start in range(0, count, TURN):
            numbers = range(start, min(start + TURN, count))
            for number in numbers:
                encoding_s, first_s = await self._first_alone(number)
                took[ENCODING].append(encoding_s)
                took[ALONE].append(first_s)
            for path, form in itertools.product((GENERATE, COMPLETIONS), FORMS):
                bodies = [self._body(path, number, FIRST_TOKENS, form) for number in numbers]
                job = {"kind": "first", "port": self._port, "path": path, "bodies": bodies}
                took[f"{path}, {form}"] += (await self._ask(job))["answer"]
            job = {"kind": "floor", "port": self._port, "path": HEALTH, "count": len(numbers)}
            took[HEALTH] += (await self._ask(job))["answer"]
        return [first_row(way, times, took[ALONE]) for way, times in took.items()]

    def stream_rows(self) -> list[dict[str, Any]]:
        return [
            stream_row(way, self._rates, self._full, self._costs[way], self._streams)
            | step_columns(self._steps_s[way], self._steps_s[ALONE])
            for way in (ALONE, GENERATE, COMPLETIONS)
        ]

    async def _streams_alone(self, num_tokens: int) -> tuple[float, list[list[float]]]:
        params = SamplingParams(num_tokens, ignore_eos=True)

        async def read(number: int) -> list[float]:
            stream = self._rig.engine.submit(self._rig.prompts[number], params, f"alone-{number}")
            return [time.perf_counter() async for tokens in stream for _ in tokens]

        started_s = time.perf_counter()
        return started_s, await asyncio.gather(*map(read, range(self._streams)))

    async def _first_alone(self, number: int) -> tuple[float, float]:
        """Seconds that encoding the prompt took, and then from submission to the first token."""
        params = SamplingParams(FIRST_TOKENS, ignore_eos=True)
        began_s = time.perf_counter()
        ids = self._rig.tokenizer.encode(self._rig.texts[number % self._streams])
        started_s = time.perf_counter()
        stream = self._rig.engine.submit(ids, params, f"first-{number}")
        arrived_s = [time.perf_counter() async for _ in stream]
        return started_s - began_s, arrived_s[0] - started_s

    def _body(self, path: str, number: int, num_tokens: int, form: str = "text") -> dict[str, Any]:
        number %= self._streams
        body: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        if path == COMPLETIONS:
            # OpenAI draws unless told otherwise; the other ways take the likeliest token.
            body |= {"model": VARIANT, "temperature": 0}
        if form == "text":
            return body | {"prompt": self._rig.texts[number]}
        return body | {"prompt" if path == COMPLETIONS else "prompt_ids": self._rig.prompts[number]}


class Clock:
    """The CPU clocks of one round, from now on; to be read on the thread of the event loop."""

    def __init__(self) -> None:
        self._wall_s, self._process_s, self._loop_s = time.perf_counter(), time.process_time(), time.thread_time()
        self._busy_s = machine_busy_s()

    def add_to(self, cost: Cost, tokens: int, client_s: float) -> None:
        process_s = time.process_time() - self._process_s
        cost.tokens += tokens
        cost.process_s += process_s
        cost.loop_s += time.thread_time() - self._loop_s
        cost.client_s += client_s
        others_s = machine_busy_s() - self._busy_s - process_s - client_s
        cost.others.append(others_s / (time.perf_counter() - self._wall_s))


def machine_busy_s() -> float:
    """CPU seconds that all processes of this machine have used since it started."""
    fields = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()[1:]
    idle_and_waiting = {3, 4}
    ticks = sum(int(value) for place, value in enumerate(fields[:8]) if place not in idle_and_waiting)
    return ticks / os.sysconf("SC_CLK_TCK")


def rate(started_s: float, times: Sequence[Sequence[float]]) -> float:
    """Tokens per second from the start to the last token."""
    return sum(map(len, times)) / (max(one[-1] for one in times) - started_s)


def full_rate(times: Sequence[Sequence[float]]) -> float:
    """Tokens per second while all requests stream: after the last one's first token, up to the first one's last."""
    start, end = max(one[0] for one in times), min(one[-1] for one in times)
    if start >= end:
        raise ValueError("no moment at which all requests stream: ask for more tokens")
    return sum(start < time_s <= end for one in times for time_s in one) / (end - start)


def stream_row(
    way: str, rates: dict[str, list[float]], full: dict[str, list[float]], cost: Cost, streams: int
) -> dict[str, Any]:
    """Rates of one way, its ratios to the engine alone round by round, and what they cost."""
    row: dict[str, Any] = {"what": "streams", "way": way, "streams": streams, "rounds": len(rates[way])}
    for name, values in (("tokens_per_s", rates), ("full_tokens_per_s", full)):
        row |= {f"{name}_{q}": value for q, value in quantiles(values[way]).items()}
        if way != ALONE:
            ratios = [mine / alone for mine, alone in zip(values[way], values[ALONE], strict=True)]
            row |= {f"{name}_ratio_{q}": value for q, value in quantiles(ratios).items()}
    row |= {
        "process_us_per_token": 1e6 * cost.process_s / cost.tokens,
        "event_loop_us_per_token": 1e6 * cost.loop_s / cost.tokens,
        "client_us_per_token": 1e6 * cost.client_s / cost.tokens,
        "others_cores_mean": sum(cost.others) / len(cost.others),
    }
    if way != ALONE:
        row |= {"goal": RATIO_GOAL, "events_per_token": cost.events / cost.tokens}
        row["holds"] = min(row["tokens_per_s_ratio_p50"], row["full_tokens_per_s_ratio_p50"]) >= RATIO_GOAL
    return row


def step_columns(steps_s: Sequence[float], alone_s: Sequence[float]) -> dict[str, Any]:
    """The time of a step that all streams take part in, and how it compares with the quiet engine's."""
    if not steps_s or not alone_s:
        return {}
    mine, quiet = (percentile(values, 50) for values in (steps_s, alone_s))
    return {
        "step_ms_p50": 1e3 * mine,
        "step_ms_p99": 1e3 * percentile(steps_s, 99),
        "step_ratio_p50": mine / quiet,
        "step_holds": mine <= STEP_GOAL * quiet,
    }


def channel_rows() -> list[dict[str, Any]]:
    """What a step of 256 decoding requests costs the engine's thread beside planning and running it."""
    ours, theirs = pair()
    end = ThreadEnd(ours, msgspec.msgpack.Decoder(ToEngine))
    far = ThreadEnd(theirs, msgspec.msgpack.Decoder(News))
    reader = threading.Thread(target=far.read_all, args=(lambda _: None,), daemon=True)
    reader.start()
    scheduler = Scheduler(
        num_blocks=CHANNEL_REQUESTS * 40,
        block_size=64,
        max_num_requests=CHANNEL_REQUESTS,
        max_batched_tokens=4 * CHANNEL_REQUESTS,
    )
    inbox = Inbox(
        VARIANT,
        scheduler,
        grammars=None,
        sink=end.send,
        read_others=lambda: (0, 8 << 30, 8 << 30, 0),
        masks=Masks(1.0),
    )
    params = SamplingParams(CHANNEL_STEPS + 16, ignore_eos=True)
    for handle in range(CHANNEL_REQUESTS):
        inbox.put(Submit(VARIANT, handle + 1, handle, f"request-{handle}", [1, 2, 3], params, 0.0, 0))
    inbox.take_in()
    plans_s, commits_s, tells_s = [], [], []
    for number in range(CHANNEL_STEPS):
        began_s = time.perf_counter()
        step = scheduler.schedule(began_s)
        planned_s = time.perf_counter()
        assert step is not None
        results = StepResults(planned_s, [number + place for place in range(len(step.chunks))])
        started_s = time.perf_counter()
        took = scheduler.commit(step, results)
        committed_s = time.perf_counter()
        inbox.publish(inbox.news(len(step.chunks), took, results))
        told_s = time.perf_counter()
        plans_s.append(planned_s - began_s)
        commits_s.append(committed_s - started_s)
        tells_s.append(told_s - committed_s)
        # As a step does, so that the reader has its turn.
        time.sleep(0.001)
    end.close()
    far.close()
    rows = []
    for what, values in (("plan", plans_s), ("commit", commits_s), ("tell", tells_s)):
        row: dict[str, Any] = {"what": "channel", "way": what, "requests": CHANNEL_REQUESTS}
        row |= {f"us_{q}": 1e6 * value for q, value in quantiles(values[16:]).items()}
        if what == "tell":
            row |= {"goal": CHANNEL_US_GOAL, "holds": row["us_p50"] < CHANNEL_US_GOAL}
        rows.append(row)
    return rows


def first_row(way: str, took: Sequence[float], alone: Sequence[float]) -> dict[str, Any]:
    """Times to the first token of one way, or of the floor, and how much of it the engine alone does not take."""
    row: dict[str, Any] = {"what": "first token", "way": way, "requests": len(took)}
    row |= {f"ms_p{q}": 1e3 * percentile(took, q) for q in (50, 99)}
    if way not in (ALONE, ENCODING, HEALTH):
        added = [mine - without for mine, without in zip(took, alone, strict=True)]
        row |= {f"added_ms_p{q}": 1e3 * percentile(added, q) for q in (50, 99)}
        row["added_ms_of_p99s"] = row["ms_p99"] - 1e3 * percentile(alone, 99)
        row |= {"goal": ADDED_MS_GOAL, "holds": max(row["added_ms_p99"], row["added_ms_of_p99s"]) < ADDED_MS_GOAL}
    return row


def table(certificate: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The result in Markdown."""
    streams = [row for row in rows if row["what"] == "streams"]
    firsts = [row for row in rows if row["what"] == "first token"]
    channel = [row for row in rows if row["what"] == "channel"]
    load = "{:.1f} before, {:.1f} after".format(certificate["load before"][0], certificate["load after"][0])
    lines = [
        f"{certificate['device']}, {certificate['cores']} cores, engine {certificate['engine']}, event loop "
        f"{certificate['event loop']}, commit {certificate['commit']}; load average {load}; "
        f"{'real-time priority; ' if certificate['is real-time'] else ''}others used "
        f"{max(row['others_cores_mean'] for row in streams):.2f} cores",
        "",
        f"| {streams[0]['streams']} streams, tokens/s | p20 | p50 | p80 | of the engine alone, p20 | p50 | p80 "
        "| while all stream, p50 | of it | goal | CPU us per token | of that event loop | client | events per token "
        "| step ms, p50 | p99 | of the quiet one |",
        "|---|" + "---|" * 16,
    ]
    for row in streams:
        ratios = [f"{row[f'tokens_per_s_ratio_{q}']:.3f}" if "goal" in row else "" for q in ("p20", "p50", "p80")]
        cells = [f"{row[f'tokens_per_s_{q}']:.0f}" for q in ("p20", "p50", "p80")] + ratios
        cells += [f"{row['full_tokens_per_s_p50']:.0f}"]
        cells += [f"{row['full_tokens_per_s_ratio_p50']:.3f}" if "goal" in row else "", verdict(row, ">= ")]
        cells += [f"{row[f'{name}_us_per_token']:.1f}" for name in ("process", "event_loop", "client")]
        cells += [f"{row['events_per_token']:.2f}" if "goal" in row else ""]
        cells += [f"{row[name]:.{digits}f}" if name in row else "" for name, digits in STEP_COLUMNS]
        lines.append(f"| {row['way']} | " + " | ".join(cells) + " |")
    if firsts:
        lines += [
            "",
            f"| first token of {firsts[0]['requests']} requests, ms | p50 | p99 | added, p50 | p99 | between the p99s "
            "| goal |",
            "|---|" + "---|" * 6,
        ]
    for row in firsts:
        added = [f"{row[name]:.2f}" if name in row else "" for name in ("added_ms_p50", "added_ms_p99")]
        added += [f"{row['added_ms_of_p99s']:.2f}" if "goal" in row else "", verdict(row, "< ")]
        cells = [f"{row['ms_p50']:.2f}", f"{row['ms_p99']:.2f}", *added]
        lines.append(f"| {row['way']} | " + " | ".join(cells) + " |")
    if channel:
        lines += [
            "",
            f"| a step of {channel[0]['requests']} requests, us | p20 | p50 | p80 | goal |",
            "|---|---|---|---|---|",
        ]
    lines += [
        f"| {row['way']} | {row['us_p20']:.0f} | {row['us_p50']:.0f} | {row['us_p80']:.0f} | {verdict(row, '< ')} |"
        for row in channel
    ]
    return "\n".join(lines)


STEP_COLUMNS = (("step_ms_p50", 2), ("step_ms_p99", 2), ("step_ratio_p50", 3))


def verdict(row: dict[str, Any], sign: str) -> str:
    return f"{sign}{row['goal']:g} {'holds' if row['holds'] else 'missed'}" if "goal" in row else ""


def device_word() -> str:
    """As the names of result files have it."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return next((word for word in ("h100", "h200") if word in name), "gpu")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "real" if torch.cuda.is_available() else "paced"
    parser.add_argument("--engine", choices=["paced", "real"], default=default)
    parser.add_argument("--model", help="model folder or id; default: the demo model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights and a made vocabulary of these shapes instead")
    parser.add_argument("--step-ms", type=float, default=5.9, help="of the paced engine; an H100 at 64 requests: 5.9")
    parser.add_argument("--launch-ms", type=float, default=0.0, help="CPU time for which a launch holds Python's lock")
    parser.add_argument("--acquires", type=int, default=1, help="parts of a launch, between which it lets the lock go")
    parser.add_argument("--in-process", action="store_true", help="the engine as a thread of the web's process")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens, about")
    parser.add_argument("--tokens", type=int, default=256, help="output tokens of a stream")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each way takes")
    parser.add_argument("--requests", type=int, default=1000, help="single requests, whose first token is timed")
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", help="JSON file; default: benchmarks/results/")
    args = parser.parse_args(words)
    if args.model == "demo":
        args.model = None
    return args


if __name__ == "__main__":
    sys.exit(main())
