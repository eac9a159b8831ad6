"""Two ranks in two processes over gloo: the answers, what is told, and the end of either."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from service.engine.api import FinishReason, SamplingParams, Token
from service.engine.shapes import Shape
from service.engine.step_table import TableLayout
from service.errors import InvalidSettings, UnsupportedModel
from service.host.model_host import ModelHost
from service.host.ranks.board import NUM_SLOTS, Board
from service.host.ranks.group import RankGroup, RunnerLead, refuse_missing_gpus
from service.host.ranks.process import Follower, messages_of
from service.host.reloader import open_host
from service.host.variants import scheme_of
from service.models.config import ModelConfig
from service.models.decoder import score
from service.models.random_weights import random_decoder
from service.settings import load_settings
from tests.support.engines import CPU, collect
from tests.support.thread_ranks import on_ranks
from tests.support.tiny_models import save_tiny_model
from tests.support.two_ranks import SHAPE, settings_of

PROMPTS = [[(7 * i + 3 * j) % 250 + 3 for j in range(3 + 11 * i)] for i in range(8)]
KINDS = [
    SamplingParams(12, ignore_eos=True),
    SamplingParams(12, temperature=0.5, seed=4, ignore_eos=True),
    SamplingParams(12, logprobs=2, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(12, repetition_penalty=1.5, presence_penalty=0.5, ignore_eos=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("ranks") / "model", "llama", **SHAPE)


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[dict[int, ModelHost]]:
    found = {size: open_host(settings_of(folder, size)) for size in (1, 2)}
    yield found
    for host in found.values():
        host.stop()


def answers(host: ModelHost, variant: str) -> list[list[int]]:
    async def go() -> list[list[Token]]:
        engine = host.engines[variant]
        return await asyncio.gather(*(collect(engine, p, KINDS[n % 4], str(n)) for n, p in enumerate(PROMPTS)))

    return [[token.id for token in tokens] for tokens in asyncio.run(go())]


def test_float_answers_are_those_of_one_rank(hosts: dict[int, ModelHost]) -> None:
    assert hosts[2].self_check() == hosts[1].self_check() == {}
    whole, split = (hosts[size].variants["w8a8"].self_check_kl for size in (1, 2))
    assert whole is not None
    assert split == pytest.approx(whole, rel=0.3)
    assert answers(hosts[2], "fp16") == answers(hosts[1], "fp16")


def test_info_has_each_rank_and_its_part_of_the_memory(hosts: dict[int, ModelHost]) -> None:
    whole, split = hosts[1].info(), hosts[2].info()
    assert (whole.tensor_parallel, split.tensor_parallel) == (1, 2)
    assert hosts[2].group is not None
    assert [rank.pid for rank in split.ranks] == [os.getpid(), *hosts[2].group.pids]
    assert [rank.rank for rank in split.ranks] == [0, 1]
    for name, variant in split.variants.items():
        weights, caches = zip(
            *((rank.weight_bytes[name], rank.kv_cache_bytes[name]) for rank in split.ranks), strict=True
        )
        assert (weights[0], caches[0]) == (variant.weight_bytes, variant.kv_cache_bytes)
        assert caches[1] == caches[0]
        assert abs(weights[1] / weights[0] - 1) < 0.01
        assert whole.ranks[0].weight_bytes[name] > 1.8 * weights[1]


def test_int8_answers_are_those_of_the_sharded_decoder(hosts: dict[int, ModelHost], folder: Path) -> None:
    """The first tokens, which come from prompts read whole. What a rank rounds is tested with the decoder."""
    settings, config = settings_of(folder, 2), ModelConfig.load(folder)
    scheme = scheme_of("w8a8", settings)
    found = answers(hosts[2], "w8a8")
    for number in range(0, len(PROMPTS), 4):
        ids = torch.tensor(PROMPTS[number])
        logits = on_ranks(
            2,
            lambda ranks, ids=ids: score(  # type: ignore[misc]
                random_decoder(config, scheme, torch.float32, CPU, settings.seed, ranks=ranks), ids
            ),
        )[0]
        assert found[number][0] == int(logits[-1].argmax())


def test_a_thousand_requests_with_cancels_leave_nothing(hosts: dict[int, ModelHost]) -> None:
    rng, engine = random.Random(0), hosts[2].engines["w8a8"]

    async def one(number: int) -> None:
        await asyncio.sleep(rng.random() * 5)
        params = SamplingParams(rng.randrange(1, 8), temperature=rng.choice([0.0, 1.0]), ignore_eos=True)
        stream = engine.submit([rng.randrange(3, 250) for _ in range(rng.randrange(1, 40))], params, str(number))
        limit = rng.choice([1, 3, 99])
        count = 0
        async for tokens in stream:
            count += len(tokens)
            if count >= limit:
                stream.finish(FinishReason.STOP)

    async def go() -> None:
        await asyncio.gather(*(one(number) for number in range(1000)))

    asyncio.run(go())
    while engine.stats().num_running:
        time.sleep(0.01)
    scheduler = engine._scheduler
    scheduler.check_integrity()
    assert scheduler.is_idle
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_what_ranks_cannot_share_is_refused_before_any_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankGroup, "__init__", lambda *_: pytest.fail("ranks were started"))
    odd = save_tiny_model(tmp_path / "odd", "llama")
    with pytest.raises(UnsupportedModel, match="tensor_parallel 2 does not divide the 3 heads"):
        open_host(settings_of(odd, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidSettings, match="tensor_parallel 4 needs 4 GPUs, one for each rank, and 2 are visible"):
        refuse_missing_gpus(torch.device("cuda"), 4)


def test_slots_of_the_board_are_used_in_turn() -> None:
    layout = TableLayout(max_tokens=8, max_requests=4, max_blocks=2)
    first = Board(layout.size)
    other = Board(layout.size, os.dup(first.descriptor))
    for turn in range(2 * NUM_SLOTS):
        numbers = np.full(turn + 1, turn, dtype=np.int32)
        slot = first.write([numbers, numbers[:1]])
        assert slot == turn % NUM_SLOTS
        assert other.read(slot)[: turn + 2].tolist() == [*numbers.tolist(), turn]


@pytest.mark.parametrize(("has_ended", "is_behind"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_rank_notes_a_step_that_only_it_launches_late(
    monkeypatch: pytest.MonkeyPatch, has_ended: bool, is_behind: bool
) -> None:
    class Follows:
        def follow(self, numbers: np.ndarray, *, shape: Shape | None, **sizes: int) -> bool:
            return has_ended

    monkeypatch.setattr("service.host.ranks.process.GroupRanks", lambda: SimpleNamespace(rank=1))
    layout = TableLayout(max_tokens=1, max_requests=1, max_blocks=1)
    board = Board(layout.size)
    other = Board(layout.size, os.dup(board.descriptor))
    follower = Follower(load_settings(), CPU, other, lambda _: None)
    follower.runners["w8a8"] = Follows()  # type: ignore[assignment]
    lead = RunnerLead("w8a8", board, follower.do)  # type: ignore[arg-type]
    numbers = np.zeros(layout.size, dtype=np.int32)
    table = layout.table(numbers, num_tokens=1, num_requests=1, num_samples=1, num_tables=1, width=1, is_decode=True)
    other_lead = RunnerLead("fp16", board, lambda _: None)
    for _ in range(NUM_SLOTS + 1):
        slot = lead.forward(table, None, is_behind=is_behind)
        assert lead.was_late(slot) == (has_ended and is_behind)
        assert not other_lead.was_late(other_lead.forward(table, None, is_behind=True)), "of another variant"


def test_only_what_a_step_uses_is_copied() -> None:
    layout = TableLayout(max_tokens=8, max_requests=4, max_blocks=2)
    board = Board(layout.size)
    sizes = {"num_tokens": 5, "num_requests": 3, "num_samples": 2, "num_tables": 3, "width": 1, "is_decode": False}
    sent = layout.table(np.arange(layout.size, dtype=np.int32), **sizes)  # type: ignore[arg-type]
    table = layout.table(np.full(layout.size, -7, dtype=np.int32), **sizes)  # type: ignore[arg-type]
    layout.unpack(board.read(board.write(sent.columns)), table.numbers, **sizes)  # type: ignore[arg-type]
    for had, got in zip(sent.columns, table.columns, strict=True):
        assert got.tolist() == had.tolist()
    num_used = sum(map(len, sent.columns))
    assert num_used == 4 * 5 + (3 + 1) + 3 + 2 * 2 + 3 * 1
    assert (table.numbers == -7).sum() == len(table.numbers) - num_used


@pytest.mark.parametrize("polling_s", [0.0, 0.05])
def test_messages_come_in_order_until_the_end(polling_s: float) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, ThreadPoolExecutor(1) as pool, theirs:
        found = pool.submit(lambda: [bytes(each) for each in messages_of(theirs, polling_s)])
        for content in (b"1", b"2", b"3"):
            # Longer than it polls, so that some are read asleep.
            time.sleep(0.04)
            ours.sendall(content)
        ours.close()
        assert found.result(20) == [b"1", b"2", b"3"]
