"""What a cluster gains and costs: replicas side by side, the gateway in front, a killed replica, a rolling update.

    python -m benchmarks.cluster                      a tiny random model on this machine's cores
    python -m benchmarks.cluster --parts overhead     one part: scaling, overhead, kill, update or costs
    python -m benchmarks.cluster --shape llama-3.1-8b --parts scaling kill --replicas 1 2 --streams 256
                                                      random weights in W8A8, on this machine's GPUs

Needs the extra `cluster`. Every part starts `ottava cluster` as a user would. Replicas, gateway, Ray and the clients,
which are a process of their own, share this machine's cores: with two cores four replicas cannot be faster than two,
and the figures of one part only compare with those of the same part. With --shape each replica has a GPU of its own,
or more with --flags "--random-weights --tensor-parallel 2".

- scaling: a closed loop of --streams clients for --seconds; 1, 2 and 4 replicas. The tiny model's take 8 requests at a
  time and compute with one thread.
- overhead: one replica, one stream at a time, the same request in turn to the replica itself, through the gateway, and,
  to show what that way would cost, through a deployment behind Ray's own proxy, whose tokens go through Ray.
- kill: two replicas under load, one of which gets SIGKILL; time until both are ready again.
- update: two replicas under load, each replaced by one with another setting.
- costs: one replica under load, with short and with long answers; CPU time of each process per request and per token.

A request is lost if it ends without an answer, an error or an error event, or with other tokens than in a quiet
cluster. The last line printed is JSON; the exit code is 1 if a request was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.processes import children, cpu_s, descendants, free_port
from benchmarks.random_checkpoint import write_without_weights
from benchmarks.report import RESULTS, birth_certificate, quantiles, write
from benchmarks.shapes import SHAPES
from service.measures import percentile

PARTS = ("scaling", "overhead", "kill", "update", "costs")
"""The last one only where it is asked for."""

WAIT_S = 300.0
POLL_S = 0.1
TOKENS = 48
FEW_TOKENS = 4
PROMPTS = 24
WORDS = [f"w{number}" for number in range(1, 13)]
"""What a random checkpoint's tokenizer knows."""

TINY = ("--cpus-per-replica", "0.1", "--dtype", "float32")
"""Flags of replicas of the tiny model."""

RANDOM = ("--random-weights",)
"""Flags of replicas of --shape."""

FEW_ROWS = ("--max-num-requests", "8")
SERVES = re.compile(r"pid=(\d+).*replica (\w+) serves at (http://\S+)")
OK, TOLD, REFUSED, LOST = "answered", "told of the loss", "refused", "lost"
"""How a request ends: complete; with an error or error event; with 503; in none of these ways."""

COUNTS = (OK, TOLD, REFUSED, LOST)


@dataclass(slots=True)
class Outcome:
    """One request. gaps_s: between its events, times since it was sent. ids: of its tokens."""

    prompt: str
    kind: str = LOST
    sent_s: float = 0.0
    first_s: float | None = None
    ended_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    said: str = ""


class RunningCluster:
    """`ottava cluster` as a child, whose log is read for the replicas' processes."""

    def __init__(self, model: Path, replicas: int, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = model
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log", prefix="cluster-")  # noqa: SIM115
        self.replicas = replicas
        self.flags = flags
        self.process = self._start(*flags)

    def _start(self, *flags: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(*flags), stdout=self._log, stderr=subprocess.STDOUT)

    def command(self, *flags: str) -> list[str]:
        return command_of(self.model, self.replicas, self.port, *flags)

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def members(self) -> dict[str, tuple[int, str]]:
        """Every replica that has ever served: name -> process id, URL."""
        return {name: (int(pid), url) for pid, name, url in SERVES.findall(self.log)}

    def stop(self, timeout_s: float = WAIT_S) -> int:
        """Stop as a user does. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


def command_of(model: Path, replicas: int, port: int, *flags: str) -> list[str]:
    own = ["--replicas", str(replicas), "--port", str(port), "--variants", "w8a8"]
    return [sys.executable, "-m", "service", "cluster", str(model), *own, *flags]


@contextlib.contextmanager
def running(model: Path, replicas: int, *flags: str) -> Iterator[RunningCluster]:
    """A cluster whose replicas are all ready."""
    cluster = RunningCluster(model, replicas, *flags)
    try:
        asyncio.run(until_ready(cluster, replicas))
        yield cluster
        code = cluster.stop()
        if code:
            raise RuntimeError(f"`ottava cluster` ended with {code}: {cluster.log[-2000:]}")
    finally:
        cluster.close()


async def until_ready(cluster: RunningCluster, replicas: int, without: Sequence[str] = ()) -> float:
    """Wait until this many replicas are ready, none of them among `without`. Returns the time that it took."""
    start_s = time.perf_counter()
    async with aiohttp.ClientSession() as session:
        while time.perf_counter() < start_s + WAIT_S:
            if cluster.process.poll() is not None:
                raise RuntimeError(f"`ottava cluster` has ended: {cluster.log[-2000:]}")
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                timeout = aiohttp.ClientTimeout(total=5)
                async with session.get(f"{cluster.url}/ready", timeout=timeout) as answer:
                    states = (await answer.json())["replicas"]
                    ready = [name for name, state in states.items() if state.get("ready") and name not in without]
                    if len(ready) >= replicas and len(states) == replicas:
                        return time.perf_counter() - start_s
            await asyncio.sleep(POLL_S)
    raise TimeoutError(f"not {replicas} replicas within {WAIT_S:g} s: {cluster.log[-2000:]}")


async def ask(
    session: aiohttp.ClientSession, url: str, prompt: str, stream: bool = True, tokens: int = TOKENS
) -> Outcome:
    """One greedy request, and how it ended."""
    outcome = Outcome(prompt, sent_s=time.perf_counter())
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    try:
        async with session.post(f"{url}/generate", json=body) as answer:
            if answer.status != 200:
                outcome.said = (await answer.text())[:200]
                outcome.kind = REFUSED if answer.status == 503 else TOLD
            elif stream:
                await _read_stream(answer, outcome)
            else:
                outcome.ids = (await answer.json())["token_ids"]
                outcome.kind = OK
    except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
        outcome.said = repr(error)
    outcome.ended_s = time.perf_counter()
    return outcome


async def _read_stream(answer: aiohttp.ClientResponse, outcome: Outcome) -> None:
    before_s = outcome.sent_s
    async for line in answer.content:
        if not line.startswith(b"data: "):
            continue
        now_s = time.perf_counter()
        if line.startswith(b"data: [DONE]"):
            outcome.kind = OK
            return
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            outcome.kind, outcome.said = TOLD, event["error"]["message"]
        elif "finish_reason" in event:
            outcome.ids = event["token_ids"]
        else:
            if outcome.first_s is None:
                outcome.first_s = now_s - outcome.sent_s
            else:
                outcome.gaps_s.append(now_s - before_s)
            before_s = now_s


@contextlib.asynccontextmanager
async def load(url: str, streams: int, whole: int = 0, tokens: int = TOKENS) -> AsyncIterator[list[Outcome]]:
    """A closed loop of clients while the context lasts; the list has every request once it has ended.

    streams, whole: clients that ask for streams, and for whole answers. tokens: of an answer.
    """
    outcomes: list[Outcome] = []
    is_over = asyncio.Event()

    async def client(number: int, stream: bool) -> None:
        own = random.Random(number)
        while not is_over.is_set():
            outcomes.append(await ask(session, url, own.choice(prompts()), stream, tokens))
            if outcomes[-1].kind != OK:
                await asyncio.sleep(POLL_S)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = [asyncio.create_task(client(n, n < streams)) for n in range(streams + whole)]
        try:
            yield outcomes
        finally:
            is_over.set()
            await asyncio.gather(*clients)


def prompts() -> list[str]:
    return [" ".join(WORDS[(start + n) % len(WORDS)] for n in range(8 + start)) for start in range(PROMPTS)]


async def quiet_answers(url: str) -> dict[str, list[int]]:
    """The tokens of every prompt, one after the other."""
    async with aiohttp.ClientSession() as session:
        answers = {prompt: await ask(session, url, prompt) for prompt in prompts()}
    assert all(answer.kind == OK for answer in answers.values()), [answer.said for answer in answers.values()]
    return {prompt: answer.ids for prompt, answer in answers.items()}


def counts(outcomes: Sequence[Outcome], expected: Mapping[str, list[int]]) -> dict[str, int]:
    """Requests by how they ended. Other tokens than expected count as lost."""
    for outcome in outcomes:
        if outcome.kind == OK and outcome.ids != expected[outcome.prompt]:
            pairs = enumerate(zip(outcome.ids, expected[outcome.prompt], strict=False))
            place = next((place for place, (one, other) in pairs if one != other), len(outcome.ids))
            outcome.kind, outcome.said = LOST, f"other tokens from {place} on"
    kinds = Counter(outcome.kind for outcome in outcomes)
    return {kind: kinds[kind] for kind in COUNTS}


def scaling(model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for replicas in args.replicas:
        with running(model, replicas, *args.flags, *(() if args.shape else FEW_ROWS)) as cluster:
            rows.append(asyncio.run(_under_load(cluster, replicas, args)))
    return rows


async def _under_load(cluster: RunningCluster, replicas: int, args: argparse.Namespace) -> dict[str, Any]:
    expected = await quiet_answers(cluster.url)
    async with load(cluster.url, args.streams) as outcomes:
        await asyncio.sleep(args.seconds)
        end_s = time.perf_counter()
    done = [each for each in outcomes if each.kind == OK and each.ended_s <= end_s]
    first = [each.first_s * 1e3 for each in done if each.first_s is not None]
    whole = [(each.ended_s - each.sent_s) * 1e3 for each in done]
    gaps = [gap * 1e3 for each in done for gap in each.gaps_s]
    return {
        "part": "scaling",
        "replicas": replicas,
        "streams": args.streams,
        "seconds": args.seconds,
        "requests": counts(outcomes, expected),
        "flags": cluster.flags,
        "tokens_per_s": len(done) * TOKENS / args.seconds,
        "first_token_ms": quantiles(first) | {"p99": percentile(first, 99)},
        "between_events_ms": quantiles(gaps) | {"p99": percentile(gaps, 99)},
        "request_ms": quantiles(whole) | {"p99": percentile(whole, 99)},
    }


def overhead(model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    with running(model, 1, *args.flags) as cluster:
        ((_, direct),) = cluster.members().values()
        proxy = free_port()
        relay = subprocess.Popen([sys.executable, "-m", "benchmarks.cluster_relay", direct, str(proxy)])
        try:
            ways = {"replica": direct, "gateway": cluster.url, "Ray's proxy": f"http://127.0.0.1:{proxy}"}
            return asyncio.run(_in_turn(ways, args.rounds))
        finally:
            relay.terminate()
            relay.wait()


async def _in_turn(ways: Mapping[str, str], rounds: int) -> list[dict[str, Any]]:
    found: dict[str, list[Outcome]] = {way: [] for way in ways}
    prompt = prompts()[0]
    async with aiohttp.ClientSession() as session:
        for url in ways.values():
            await _until_it_answers(session, url, prompt)
        for _ in range(rounds):
            for way, url in ways.items():
                found[way].append(await ask(session, url, prompt))
    rows = []
    for way, outcomes in found.items():
        assert all(each.kind == OK for each in outcomes), (way, [each.said for each in outcomes])
        first = [each.first_s * 1e3 for each in outcomes if each.first_s is not None]
        gaps = [gap * 1e3 for each in outcomes for gap in each.gaps_s]
        rows.append(
            {
                "part": "overhead",
                "way": way,
                "requests": len(outcomes),
                "first_token_ms": quantiles(first),
                "between_events_ms": quantiles(gaps),
                "request_ms": quantiles([(each.ended_s - each.sent_s) * 1e3 for each in outcomes]),
            }
        )
    return rows


async def _until_it_answers(session: aiohttp.ClientSession, url: str, prompt: str) -> None:
    until_s = time.perf_counter() + WAIT_S
    while (outcome := await ask(session, url, prompt)).kind != OK:
        if time.perf_counter() > until_s or outcome.said.startswith("{"):
            raise TimeoutError(f"{url} does not answer: {outcome.said}")
        await asyncio.sleep(POLL_S)


def kill(model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    with running(model, 2, *args.flags) as cluster:
        return [asyncio.run(killed(cluster, args.streams, args.seconds))]


async def killed(cluster: RunningCluster, streams: int, seconds: float) -> dict[str, Any]:
    """SIGKILL one replica under load, and wait until it has been replaced."""
    expected = await quiet_answers(cluster.url)
    name, (pid, _) = sorted(cluster.members().items())[0]
    async with load(cluster.url, streams, streams // 2) as outcomes:
        await asyncio.sleep(seconds / 2)
        killed_s = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        recovery_s = await until_ready(cluster, cluster.replicas, without=[name])
        await asyncio.sleep(seconds / 2)
    during = sorted(each.ended_s for each in outcomes if each.kind == OK and each.ended_s >= killed_s)
    return {
        "part": "kill",
        "replicas": cluster.replicas,
        "streams": streams,
        "whole answers": streams // 2,
        "requests": counts(outcomes, expected),
        "said": sorted({each.said for each in outcomes if each.said}),
        "recovery_s": recovery_s,
        "longest_without_an_answer_s": max(
            after - before for before, after in zip([killed_s, *during], during, strict=False)
        ),
    } | await retries(cluster.url)


def update(model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    with running(model, 2, *args.flags) as cluster:
        return [asyncio.run(updated(cluster, args.streams, args.seconds))]


async def updated(cluster: RunningCluster, streams: int, seconds: float) -> dict[str, Any]:
    """Replace every replica under load by one with another setting."""
    expected = await quiet_answers(cluster.url)
    old = sorted(cluster.members())
    async with load(cluster.url, streams, streams // 2) as outcomes:
        await asyncio.sleep(seconds / 2)
        start_s = time.perf_counter()
        command = cluster.command("--max-waiting", "777", "--address", "auto", "--detach", *cluster.flags)
        process = await asyncio.create_subprocess_exec(*command)
        assert await process.wait() == 0
        await until_ready(cluster, cluster.replicas, without=old)
        update_s = time.perf_counter() - start_s
        await asyncio.sleep(seconds / 2)
    return {
        "part": "update",
        "replicas": cluster.replicas,
        "streams": streams,
        "whole answers": streams // 2,
        "requests": counts(outcomes, expected),
        "said": sorted({each.said for each in outcomes if each.said}),
        "update_s": update_s,
    } | await retries(cluster.url)


def costs(model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    with running(model, 1, *args.flags, "--max-num-requests", str(args.streams)) as cluster:
        spent = [asyncio.run(_spent(cluster, tokens, args)) for tokens in (FEW_TOKENS, TOKENS)]
    rows = []
    for role in spent[0]:
        few, many = (each[role] for each in spent)
        per_token = (many - few) / (TOKENS - FEW_TOKENS)
        row = {"part": "costs", "role": role, "streams": args.streams, "ms_per_token": per_token * 1e3}
        rows.append(row | {"ms_per_request": (few - FEW_TOKENS * per_token) * 1e3})
    return rows


async def _spent(cluster: RunningCluster, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """CPU seconds per request of each process, or group of them, with answers of so many tokens."""
    async with load(cluster.url, args.streams, tokens=tokens) as outcomes:
        await asyncio.sleep(2.0)
        roles = _roles(cluster)
        count, before = len(outcomes), {role: sum(map(cpu_s, pids)) for role, pids in roles.items()}
        await asyncio.sleep(args.seconds)
        after = {role: sum(map(cpu_s, pids)) for role, pids in roles.items()}
        done = len(outcomes) - count
    assert all(each.kind == OK for each in outcomes), [each.said for each in outcomes if each.said]
    return {role: (after[role] - before[role]) / done for role in roles}


def _roles(cluster: RunningCluster) -> dict[str, list[int]]:
    """The processes of a cluster with one replica, by what they do."""
    ((web, _),) = cluster.members().values()
    all_of_them = descendants(cluster.process.pid)
    gateways = [pid for pid in all_of_them if ":gateway" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")]
    assert gateways, "no process is named after the gateway"
    roles = {"clients": [os.getpid()], "gateway": gateways, "replica": [web], "engine": children(web)}
    named = {pid for pids in roles.values() for pid in pids}
    return roles | {"Ray": [pid for pid in all_of_them if pid not in named]}


async def retries(url: str) -> dict[str, Any]:
    """The gateway's counters of requests that it sent again."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    found = re.findall(r'^ottava_cluster_retries_total\{reason="(\w+)"\} (\S+)', text, re.MULTILINE)
    return {"sent_again": {reason: int(float(count)) for reason, count in found}}


MEASURES = {"scaling": scaling, "overhead": overhead, "kill": kill, "update": update, "costs": costs}


def make_model(folder: Path, layers: int, width: int) -> Path:
    """A random Llama whose tokens are bytes, saved with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return folder


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layers", type=int, default=4, help="of the tiny model")
    parser.add_argument("--width", type=int, default=256, help="of the tiny model")
    parser.add_argument("--shape", choices=SHAPES, help="serve random weights of these shapes, not the tiny model")
    parser.add_argument("--flags", type=shlex.split, help="of `ottava cluster`; by default those of the model")
    parser.add_argument("--commit", help="where the tree carries no git history")
    parser.add_argument("--out", type=Path, default=RESULTS / "cluster-cpu.json")
    args = parser.parse_args(argv)
    if args.flags is None:
        args.flags = RANDOM if args.shape else TINY
    return args


def main() -> int:
    args = arguments()
    certificate = birth_certificate(args.commit)
    certificate |= {name: version(name) for name in ("ray", "aiohttp", "uvicorn", "fastapi")}
    certificate |= {"cores": os.cpu_count(), "load before": os.getloadavg()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        if not args.shape:
            make_model(model, args.layers, args.width)
        else:
            write_without_weights(model, args.shape, is_int8=False, max_model_len=4096)
        for part in args.parts:
            found = MEASURES[part](model, args)
            print(*map(json.dumps, found), sep="\n", file=sys.stderr)
            rows += found
            write(args.out, certificate, rows)
    print(json.dumps(rows))
    return int(any(row["requests"][LOST] for row in rows if isinstance(row.get("requests"), dict)))


if __name__ == "__main__":
    sys.exit(main())
