"""One of the other ranks: `python -m service.host.ranks.process SOCKET MEMORY SIZE RANK`, the first two descriptors.

It makes the calls that the first rank tells it, one after the other, and ends when the first rank does.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import torch

from service.engine.device.ranks import GroupRanks
from service.engine.device.runner import Runner
from service.engine.shapes import Shape
from service.errors import first_line
from service.host.limits import busy_poll_s
from service.host.machine import quiet_libraries
from service.host.ranks.board import Board
from service.host.ranks.group import join, measured
from service.host.ranks.messages import (
    Check,
    Chosen,
    Drop,
    Forward,
    Join,
    Load,
    Measure,
    Prepare,
    Prepared,
    Scored,
    Start,
    ToRank,
    Warm,
    encode,
)
from service.host.variants import checkpoint_part, load_part, runner_for
from service.models.decoder import Decoder, score
from service.process import end_process, keep_freed_memory, settle, start_thread
from service.settings import Settings, load_settings
from service.telemetry.logs import configure_logging

MAX_MESSAGE_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class Follower:
    """What one of the other ranks holds: decoders and runners by variant.

    Args:
        answer: sends a message to the first rank.
    """

    def __init__(
        self, settings: Settings, device: torch.device, board: Board, answer: Callable[[bytes], object]
    ) -> None:
        self._answer = answer
        self.settings = settings
        self.device = device
        self.board = board
        self.ranks = GroupRanks()
        self.decoders: dict[str, Decoder] = {}
        self.runners: dict[str, Runner] = {}
        self.warming: dict[str, Iterator[object]] = {}

    def do(self, message: ToRank) -> None:
        """Make one call. Raises whatever the call raises."""
        name = message.name
        match message:
            case Load():
                part = load_part(
                    name,
                    Path(message.folder),
                    message.kv,
                    settings=self.settings,
                    device=self.device,
                    ranks=self.ranks,
                )
                self.decoders[name] = part.decoder
            case Prepare():
                start_thread("reload", self._prepare, message)
            case Drop():
                self._drop(name)
            case Start():
                caches = None if message.takes is None else self.runners[message.takes].caches
                self.runners[name] = runner_for(self.decoders[name], message.num_blocks, self.settings, caches=caches)
                self.warming[name] = self.runners[name].warming()
            case Warm():
                next(self.warming[name], None)
            case Measure():
                sizes = [
                    (self.decoders[each].weight_bytes, self.runners[each].kv_cache_bytes) for each in message.variants
                ]
                measured(self.ranks, self.device, sizes)
            case Forward():
                self._follow(self.runners[name], message)
            case Chosen():
                self.runners[name].take_ids(message.num_samples)
            case Scored():
                rows = torch.from_numpy(np.frombuffer(message.rows, dtype=np.int64).copy())
                self.runners[name].follow_scores(rows)
            case Check():
                with torch.inference_mode():
                    score(self.decoders[name], torch.tensor(message.token_ids))
            case Join():
                raise AssertionError(message)

    def _prepare(self, message: Prepare) -> None:
        """Load weights, and tell the first rank whether it worked. Called on a thread of its own."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            variant = message.name.partition("@")[0]
            part = checkpoint_part(
                variant,
                Path(message.folder),
                self.settings.kv,
                settings=self.settings,
                device=self.device,
                ranks=self.ranks,
                dtype=getattr(torch, message.dtype),
            )
            self.decoders[message.name] = part.decoder
            fault = None
        except Exception as error:
            logger.exception("the weights of %s cannot be loaded", message.folder)
            fault = first_line(error)
        self._answer(encode(Prepared(message.name, fault)))

    def _drop(self, name: str) -> None:
        self.warming.pop(name, None)
        runner = self.runners.pop(name, None)
        if runner is not None:
            runner.close()
        self.decoders.pop(name, None)
        # The old weights were frozen out of garbage collection; in a reference cycle they would never be freed.
        settle()

    def _follow(self, runner: Runner, message: Forward) -> None:
        shape = Shape(message.num_tokens, message.num_requests, message.is_decode) if message.is_captured else None
        has_ended = runner.follow(self.board.read(message.slot), shape=shape, **message.sizes)
        if has_ended and message.is_behind:
            self.board.note_late(message.slot, self.ranks.rank)


def messages_of(end: socket.socket, polling_s: float = 0.0) -> Iterator[memoryview]:
    """The first rank's messages until its end is closed, each valid until the next.

    Args:
        polling_s: how long to keep asking before it sleeps.
    """
    # Made once: memory of this size for each try takes longer than the try.
    memory = memoryview(bytearray(MAX_MESSAGE_BYTES))
    while size := _polled(end, memory, polling_s) or end.recv_into(memory):
        yield memory[:size]


def _polled(end: socket.socket, memory: memoryview, polling_s: float) -> int:
    """The size of the next message, 0 at the end of them and also if there is none for so long."""
    stop_s = time.monotonic() + polling_s
    while time.monotonic() < stop_s:
        try:
            return end.recv_into(memory, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
    return 0


def main() -> NoReturn:
    """Follow the first rank until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    descriptor, memory, size, rank = map(int, sys.argv[1:])
    end = socket.socket(fileno=descriptor)
    decoder = msgspec.msgpack.Decoder(ToRank)
    joining = decoder.decode(end.recv(MAX_MESSAGE_BYTES) or end_process(1))
    assert isinstance(joining, Join)
    settings = load_settings(**joining.settings)
    configure_logging(settings, sys.stderr, f"rank {rank}")
    quiet_libraries()
    device = torch.device("cuda", rank) if joining.name == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(max(1, torch.get_num_threads() // joining.size))
    try:
        join(rank, joining.size, Path(joining.meeting), device)
        follower = Follower(settings, device, Board(size, memory), end.sendall)
        for content in messages_of(end, busy_poll_s(settings, is_gpu=device.type == "cuda")):
            follower.do(decoder.decode(content))
    except Exception:
        logger.exception("rank %d cannot go on", rank)
        end_process(1)
    end_process(0)


if __name__ == "__main__":
    main()
