"""Starts the processes of the other ranks, and tells them each call that they are to take part in.

A rank that ends, for whatever reason, ends the engines' process with it: the others would wait for it for ever. The web
then starts all of them again. Should the first rank end, the others read the end of their sockets and end too.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from quant.scheme import KVStorage
from service.engine.device.ranks import GroupRanks
from service.engine.shapes import Shape
from service.engine.step_table import StepTable, TableLayout, blocks_of
from service.errors import EngineFailed, InvalidSettings
from service.host.memory import free_bytes
from service.host.ranks.board import Board
from service.host.ranks.messages import (
    Check,
    Chosen,
    Drop,
    Forward,
    Join,
    Load,
    Measure,
    Message,
    Prepare,
    Prepared,
    Scored,
    Start,
    Warm,
    encode,
)
from service.models.config import ModelConfig
from service.models.decoder import Decoder, score
from service.models.sharding import Ranks
from service.process import end_process, start_thread
from service.settings import Settings, without_secrets

logger = logging.getLogger(__name__)

NCCL = {
    # Steps are replayed and launched on one stream, one after the other; without this a graph gets nodes of the host.
    "NCCL_GRAPH_MIXING_SUPPORT": "0",
    # Multicast over NVLink.
    "NCCL_NVLS_ENABLE": "0",
}
"""Settings of NCCL unless the environment has others."""

Sizes: TypeAlias = tuple[int, int]
"""Bytes of a variant's weights and of its KV cache, on one rank."""

COMMAND = (sys.executable, "-m", "service.host.ranks.process")
MAX_ANSWER_BYTES = 1 << 16
EXIT_S = 5.0
"""How long a rank may take to end once it is told to."""


class RankGroup:
    """The other ranks of this process' decoders.

    Args:
        settings: those of the engines; their `tensor_parallel` is the number of ranks.
        layout: of the largest step.
        on_end: called with what happened when a rank ends unasked; ends this process if None.
    """

    def __init__(
        self,
        settings: Settings,
        layout: TableLayout,
        device: torch.device,
        on_end: Callable[[str], None] | None = None,
    ) -> None:
        self._board = Board(layout.size)
        self._on_end = on_end or _end
        self._is_closing = False
        self._ends: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._meeting = Path(tempfile.mkdtemp(prefix="ottava-ranks-"))
        try:
            for rank in range(1, settings.tensor_parallel):
                self._launch(rank)
                told = Join(device.type, without_secrets(settings), rank, settings.tensor_parallel, str(self._meeting))
                self._ends[-1].sendall(encode(told))
            join(0, settings.tensor_parallel, self._meeting, device)
        except BaseException:
            self.close()
            raise
        self.ranks = GroupRanks()
        for process in self._processes:
            start_thread("rank", self._watch, process)

    def _launch(self, rank: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = theirs.fileno(), self._board.descriptor
            self._processes.append(
                subprocess.Popen(  # noqa: S603 (a fixed command)
                    [*COMMAND, *map(str, descriptors), str(self._board.size), str(rank)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=descriptors,
                )
            )
        self._ends.append(ours)

    @property
    def pids(self) -> list[int]:
        """The other ranks' processes."""
        return [process.pid for process in self._processes]

    def load(self, name: str, folder: Path, kv: KVStorage | None) -> None:
        """The other ranks load the weights of a variant, as this process then must."""
        self.tell(Load(name, str(folder), kv))

    def start(self, name: str, num_blocks: int, takes: str | None = None) -> None:
        """The other ranks make a runner. takes: whose caches it takes over; None allocates new ones."""
        self.tell(Start(name, num_blocks, takes))

    def prepare(self, name: str, folder: Path, dtype: torch.dtype) -> None:
        """The other ranks load the weights of a reload while steps go on. Call `prepared` afterwards."""
        self.tell(Prepare(name, str(folder), str(dtype).removeprefix("torch.")))

    def prepared(self) -> list[str]:
        """Wait until the other ranks have loaded, and return why some have not."""
        faults = []
        for rank, end in enumerate(self._ends, 1):
            content = end.recv(MAX_ANSWER_BYTES)
            if not content:
                raise EngineFailed(f"rank {rank} ended while it loaded weights")
            fault = msgspec.msgpack.decode(content, type=Prepared).fault
            faults += [] if fault is None else [f"rank {rank}: {fault}"]
        return faults

    def drop(self, name: str) -> None:
        """The other ranks let go of weights and runner, if they have any."""
        self.tell(Drop(name))

    def end(self, why: str) -> None:
        """End this process, as where a rank ends: the others may be waiting for a part that this one cannot do."""
        self._on_end(why)

    def measured(self, device: torch.device, sizes: Mapping[str, Sizes]) -> list[list[int]]:
        """`measured` on all ranks, of the variants that this one's sizes are given for."""
        self.tell(Measure("", list(sizes)))
        return measured(self.ranks, device, list(sizes.values()))

    def score(self, name: str, decoder: Decoder, token_ids: Tensor) -> Tensor:
        """`service.models.decoder.score`, on all ranks."""
        self.tell(Check(name, token_ids.tolist()))
        return score(decoder, token_ids)

    def lead(self, name: str) -> RunnerLead:
        """Tells the other ranks' runners of a variant."""
        return RunnerLead(name, self._board, self.tell)

    def tell(self, message: Message) -> None:
        """Send a message to every other rank."""
        send(self._ends, message)

    def close(self) -> None:
        """End the other ranks. Idempotent."""
        self._is_closing = True
        for end in self._ends:
            end.close()
        for process in self._processes:
            try:
                process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        shutil.rmtree(self._meeting, ignore_errors=True)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self._is_closing:
            self._on_end(f"rank {1 + self._processes.index(process)} (pid {process.pid}) ended with code {code}")


class RunnerLead:
    """Implements `service.engine.device.ranks.Lead` for a variant."""

    def __init__(self, name: str, board: Board, tell: Callable[[Message], None]) -> None:
        self._name = name
        self._board = board
        self._tell = tell

    def warm(self) -> None:
        """See `Lead`."""
        self._tell(Warm(self._name))

    def forward(self, table: StepTable, shape: Shape | None, *, is_behind: bool) -> int:
        """See `Lead`."""
        num_tables, width = table.block_tables.shape
        slot = self._board.write(table.columns)
        self._tell(
            Forward(
                self._name,
                slot,
                len(table.token_ids),
                len(table.context_lens),
                len(table.sample_index),
                num_tables,
                width,
                table.is_decode,
                is_captured=shape is not None,
                is_behind=is_behind,
            )
        )
        return slot

    def was_late(self, slot: int) -> bool:
        """See `Lead`."""
        return self._board.was_late(slot)

    def chosen(self, num_samples: int) -> None:
        """See `Lead`."""
        self._tell(Chosen(self._name, num_samples))

    def scored(self, rows: Tensor) -> None:
        """See `Lead`."""
        self._tell(Scored(self._name, rows.numpy().tobytes()))


def send(ends: Sequence[socket.socket], message: Message) -> None:
    """Send a message to every other rank."""
    content = encode(message)
    for end in ends:
        end.sendall(content)


def join(rank: int, size: int, meeting: Path, device: torch.device) -> None:
    """Join the process group that meets in a folder. Returns once all ranks have."""
    if device.type == "cuda":
        for name, value in NCCL.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting}/meet",
        rank=rank,
        world_size=size,
        device_id=torch.device("cuda", rank) if device.type == "cuda" else None,
    )


def measured(ranks: Ranks, device: torch.device, sizes: Sequence[Sizes]) -> list[list[int]]:
    """Of each rank: the process' id, the free bytes of its device, then its sizes. All ranks call it."""
    own = [os.getpid(), free_bytes(device), *(count for pair in sizes for count in pair)]
    found: list[list[int]] = ranks.all_gather(torch.tensor(own, dtype=torch.int64, device=device)).tolist()
    return found


def layout_of(settings: Settings, config: ModelConfig, device: torch.device) -> TableLayout:
    """The layout of the largest step, on every rank the same."""
    return TableLayout(
        max_tokens=settings.step_tokens(device.type),
        max_requests=settings.max_num_requests,
        max_blocks=blocks_of(config.max_model_len, settings.block_size),
    )


def refuse_missing_gpus(device: torch.device, size: int) -> None:
    """Raise InvalidSettings if there is no GPU for each rank."""
    count = torch.cuda.device_count() if device.type == "cuda" else size
    if count < size:
        raise InvalidSettings(
            f"tensor_parallel {size} needs {size} GPUs, one for each rank, and {count} are visible here"
        )


def _end(why: str) -> None:
    logger.error("%s: the engines end with it, since it holds a part of every weight", why)
    end_process(1)
