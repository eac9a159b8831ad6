"""What it costs to tell other ranks a step: the first rank's time, and when another has the step's numbers.

    python -m benchmarks.step_broadcast --ranks 2 --out benchmarks/results/step-broadcast-cpu.json

Steps of decodes and of prompts, of a model of 8192 tokens, in the memory and over the sockets of `service.host.ranks`.
Another rank is a process that copies each step into memory of its own, as `Runner.follow` does, and runs nothing.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.report import birth_certificate, quantiles, write
from service.busy_poll import DEFAULT_S
from service.engine.step_table import StepTable, TableLayout
from service.host.ranks.board import Board
from service.host.ranks.group import RunnerLead, send
from service.host.ranks.messages import Forward, ToRank
from service.host.ranks.process import messages_of

LAYOUT = TableLayout(max_tokens=2048, max_requests=256, max_blocks=128)
STEPS = {
    "1 decode": {"num_tokens": 1, "num_requests": 1, "width": 8},
    "32 decodes": {"num_tokens": 32, "num_requests": 32, "width": 16},
    "256 decodes": {"num_tokens": 256, "num_requests": 256, "width": 16},
    "4 prompts of 512": {"num_tokens": 2048, "num_requests": 4, "width": 8},
}


def table_of(sizes: dict[str, int]) -> StepTable:
    """A step of these sizes, of which every request samples."""
    num_requests = sizes["num_requests"]
    numbers = np.arange(LAYOUT.size, dtype=np.int32)
    is_decode = num_requests == sizes["num_tokens"]
    return LAYOUT.table(numbers, num_samples=num_requests, num_tables=num_requests, is_decode=is_decode, **sizes)


def follow(descriptor: int, memory: int, polls: int) -> None:
    """Another rank: copies each step, and answers with when it had it, in nanoseconds of the monotonic clock."""
    board, host = Board(LAYOUT.size, memory), np.zeros(LAYOUT.size, dtype=np.int32)
    decoder = msgspec.msgpack.Decoder(ToRank)
    with socket.socket(fileno=descriptor) as end:
        for content in messages_of(end, polls * DEFAULT_S):
            message = decoder.decode(content)
            assert isinstance(message, Forward)
            LAYOUT.unpack(board.read(message.slot), host, **message.sizes)  # type: ignore[arg-type]
            end.send(time.perf_counter_ns().to_bytes(8, "little"))


def rest(end: socket.socket, seconds: float, *, polls: bool) -> None:
    """What the first rank does until the next step: sleeps, or asks a socket as an engine that polls does."""
    stop_s = time.perf_counter() + seconds
    if not polls:
        time.sleep(seconds)
    while time.perf_counter() < stop_s:
        with suppress(BlockingIOError):
            end.recv(8, socket.MSG_DONTWAIT)


def measure(
    table: StepTable, board: Board, ends: list[socket.socket], args: argparse.Namespace, *, polls: bool
) -> dict[str, Any]:
    """Quantiles of one step's broadcast, in microseconds, over steps that follow each other as those of a model do."""
    lead = RunnerLead("w8a8", board, partial(send, ends))
    told_us, had_us = [], []
    for _ in range(args.steps):
        rest(ends[0], args.step_ms / 1e3, polls=polls)
        begun = time.perf_counter_ns()
        lead.forward(table, None, is_behind=True)
        ended = time.perf_counter_ns()
        had = [int.from_bytes(end.recv(8), "little") for end in ends]
        told_us.append((ended - begun) / 1e3)
        had_us.append((max(had) - begun) / 1e3)
    kept = slice(args.steps // 10, None)
    return {"first_rank_us": quantiles(told_us[kept]), "last_rank_has_it_us": quantiles(had_us[kept])}


def measure_all(args: argparse.Namespace, polls: bool) -> list[dict[str, Any]]:
    """A row for each kind of step. polls: all ranks keep asking for the next one, as on a GPU, and else they sleep."""
    board, ends, processes = Board(LAYOUT.size), [], []
    for _ in range(1, args.ranks):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            passed = theirs.fileno(), board.descriptor
            command = [sys.executable, "-m", "benchmarks.step_broadcast", "--follow", *map(str, (*passed, int(polls)))]
            processes.append(subprocess.Popen(command, pass_fds=passed))
        ends.append(ours)
    rows = []
    for name, sizes in STEPS.items():
        table = table_of(sizes)
        found = measure(table, board, ends, args, polls=polls)
        num_bytes = sum(column.nbytes for column in table.columns)
        row = {"step": name, "bytes": num_bytes, "step_ms": args.step_ms, "ranks": args.ranks, "polls": polls}
        rows.append(row | found)
        print(row | found)
    for end in ends:
        end.close()
    for process in processes:
        process.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500, help="steps of each kind, of which a tenth are not counted")
    parser.add_argument("--step-ms", type=float, default=5.0, help="time between two steps")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--follow", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.follow:
        follow(*args.follow)
        return
    rows = [row for polls in (False, True) for row in measure_all(args, polls)]
    if args.out:
        write(args.out, birth_certificate(), rows)


if __name__ == "__main__":
    main()
