"""A model on several GPUs, or processes of a CPU, whose clients leave and whose ranks are killed.

    python -m benchmarks.rank_faults --tensor-parallel 2                       llama-3.1-8b, random weights
    python -m benchmarks.rank_faults --tensor-parallel 2 --shape tiny          the same on a CPU

First --requests requests, each of which may leave after some tokens; then, for each rank from the last to the first, 50
streams during which it is killed. Clients must be answered or told; afterwards no KV block is in use and each GPU holds
what it held. After a kill no process of before lives, there is no more shared memory than before, and the server gives
the answers that it gave at first.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.clients import Kind, Question, Seen, ask
from benchmarks.faults.server import Server
from benchmarks.processes import descendants, is_running
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.report import RESULTS, birth_certificate, write
from benchmarks.shapes import SHAPES
from service.web.uvicorn_config import allow_open_files

NUM_STREAMS = 50
STREAM_TOKENS = 2000
KILLED_AFTER_S = 2.0
READY_S = 240.0
SLACK_MB = 64.0
"""By how much the memory of a GPU may differ: what a driver keeps for a context."""


@dataclass(slots=True)
class Outcome:
    """What was done, what clients saw, and what was not as it should be."""

    what: str
    seen: Counter[str] = field(default_factory=Counter)
    numbers: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def expect(self, is_so: bool, what: str) -> None:
        if not is_so:
            self.faults.append(what)

    def row(self) -> dict[str, Any]:
        return {"what": self.what, "seen": dict(self.seen)} | self.numbers | {"faults": self.faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tensor-parallel", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--commit", help="for a tree without git history")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    allow_open_files(4096)
    with tempfile.TemporaryDirectory(prefix="ottava-ranks-") as scratch:
        folder = Path(scratch) / "checkpoint"
        write_checkpoint(folder, args.shape, is_int8=True, max_model_len=4096)
        arguments = [str(folder), "--variants", "w8a8", "--tensor-parallel", str(args.tensor_parallel)]
        with Server(Path(scratch) / "log", arguments) as server:
            outcomes = asyncio.run(_all(server, args.requests))
    rows = [outcome.row() for outcome in outcomes]
    write(args.out or RESULTS / "rank-faults.json", birth_certificate(args.commit), rows)
    for row in rows:
        print(row)
    return int(any(outcome.faults for outcome in outcomes))


async def _all(server: Server, num_requests: int) -> list[Outcome]:
    await server.checked()
    answers = await _answers(server)
    outcomes = [await _leaving(server, num_requests)]
    for rank in reversed(range(len(await _pids(server)))):
        outcomes.append(await _killed(server, rank))
        outcomes[-1].expect(await _answers(server) == answers, "the answers are others than at first")
    return outcomes


async def _leaving(server: Server, num_requests: int) -> Outcome:
    """Requests that come within 20 s and leave after a random number of tokens, or stay."""
    outcome, rng, before = Outcome(f"{num_requests} requests, two of three leave"), random.Random(0), gpu_mb()

    async def one(number: int) -> Seen:
        limit = rng.choice((1, 8, 10**9))
        question = Question(_prompt(number, rng.randrange(1, 400)), rng.randrange(1, 64), stream=True)
        await asyncio.sleep(20 * rng.random())
        return await ask(server.port, question, leaves=lambda received: received.count(b"data: ") >= limit)

    _take(outcome, await asyncio.gather(*(one(number) for number in range(num_requests))), (Kind.ANSWERED, Kind.LEFT))
    await _settled(server, outcome, before)
    return outcome


async def _killed(server: Server, rank: int) -> Outcome:
    """Streams during which the process of a rank is killed."""
    outcome, before = Outcome(f"rank {rank} killed under {NUM_STREAMS} streams"), gpu_mb()
    pids, shared = await _pids(server), _shared_memory()
    old = descendants(server.process.pid)
    questions = [Question(_prompt(number, 64), STREAM_TOKENS, stream=True) for number in range(NUM_STREAMS)]
    asking = asyncio.ensure_future(asyncio.gather(*(ask(server.port, question) for question in questions)))
    await asyncio.sleep(KILLED_AFTER_S)
    os.kill(pids[rank], signal.SIGKILL)
    killed_s = time.monotonic()
    _take(outcome, await asking, (Kind.FAILED,))
    outcome.numbers["all told after s"] = round(time.monotonic() - killed_s, 2)
    while not (is_ready := (await server.get("/ready")).status_code == 200) and time.monotonic() - killed_s < READY_S:
        await asyncio.sleep(0.1)
    outcome.expect(is_ready, "it is not ready again")
    outcome.numbers["ready again after s"] = round(time.monotonic() - killed_s, 1)
    left = [pid for pid in old if is_running(pid)]
    outcome.expect(not left, f"processes {left} of before still run")
    outcome.expect(set(await _pids(server)).isdisjoint(pids), "a rank has the process that it had")
    # A board of the ranks that run now takes the place of the one before.
    outcome.expect(len(_shared_memory()) <= len(shared), f"shared memory was {shared}, is {_shared_memory()}")
    await _settled(server, outcome, before)
    return outcome


def _take(outcome: Outcome, seen: Sequence[Seen], allowed: Sequence[Kind]) -> None:
    for each in seen:
        outcome.seen[str(each)] += 1
        outcome.expect(each.kind in allowed and each.is_consistent, f"a client saw {each} {each.message}".strip())


async def _settled(server: Server, outcome: Outcome, before: list[float]) -> None:
    in_use = await server.blocks_in_use()
    outcome.expect(in_use == 0, f"{in_use} of the KV blocks are in use")
    now = gpu_mb()
    outcome.numbers |= {"KV blocks in use": in_use, "GPU MB": [before, now]}
    grown = [after - had > SLACK_MB for had, after in zip(before, now, strict=True)]
    outcome.expect(not any(grown), f"the GPUs held {before} MB and hold {now}")


async def _answers(server: Server) -> list[tuple[int, ...]]:
    seen = [await ask(server.port, Question(_prompt(number, 40), 16)) for number in range(4)]
    for each in seen:
        if each.kind is not Kind.ANSWERED:
            raise RuntimeError(f"a lone request ended with {each} {each.message}")
    return [each.token_ids for each in seen]


async def _pids(server: Server) -> list[int]:
    """The process of each rank, the first that of the engine."""
    return [rank["pid"] for rank in (await server.get("/info")).json()["ranks"]]


def _prompt(number: int, length: int) -> str:
    return " ".join(f"w{(31 * number + 7 * place) % 1000}" for place in range(length))


def _shared_memory() -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").iterdir() if "ottava" in path.name)


def gpu_mb() -> list[float]:
    """Memory in use of each GPU; nothing where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return [float(line) for line in done.stdout.split()]


if __name__ == "__main__":
    sys.exit(main())
