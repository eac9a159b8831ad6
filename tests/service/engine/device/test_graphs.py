"""Which graph runs a step, and when there is one. What a graph computes: test_gpu.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from service.engine.device.graphs import DecodeGraphs
from service.engine.scheduler import Chunk, Step
from tests.support.requests import new_request


class FakeGraph:
    """Notes what becomes of it in the order of all."""

    log: list[str] = []  # noqa: RUF012

    def replay(self) -> None:
        self.log.append("replay")

    def reset(self) -> None:
        self.log.append("reset")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    @contextmanager
    def graph(_: FakeGraph, pool: str, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        FakeGraph.log.append("begin")
        yield
        FakeGraph.log.append("end")

    FakeGraph.log.clear()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return FakeGraph.log


def decodes(count: int, length: int = 1, samples: bool = True) -> Step:
    return Step([Chunk(new_request(str(i), 4), 4, length, samples, 1) for i in range(count)])


def captured(graphs: DecodeGraphs, log: list[str]) -> list[int]:
    """Captures with logits that hold their bucket."""

    def blank(bucket: int) -> int:
        log.append(f"blank {bucket}")
        return bucket

    def forward(bucket: int) -> Tensor:
        return torch.full((bucket, 3), bucket)

    return list(graphs.capture(blank, forward))  # type: ignore[arg-type]  # a batch is told by its size alone


def test_the_smallest_graph_that_holds_a_step_runs_it(log: list[str]) -> None:
    graphs = DecodeGraphs(20)
    assert graphs.bucket_of(decodes(1)) is None
    assert captured(graphs, log) == [16, 8, 4, 2, 1], "the largest first"
    assert log[:6] == ["blank 16", "begin", "end", "blank 8", "begin", "end"], "a blank step is made before a capture"
    assert [graphs.bucket_of(decodes(n)) for n in (1, 2, 3, 4, 5, 9, 16, 17, 20)] == [
        1, 2, 4, 4, 8, 16, 16, None, None
    ]  # fmt: skip
    assert graphs.bucket_of(decodes(3, length=2)) is None
    assert graphs.bucket_of(decodes(3, samples=False)) is None


def test_replay_gives_the_logits_of_its_bucket(log: list[str]) -> None:
    graphs = DecodeGraphs(8)
    captured(graphs, log)
    log.clear()
    assert graphs.replay(4).tolist() == [[4] * 3] * 4
    assert log == ["replay"]


def test_no_graph_is_used_before_all_are_there(log: list[str]) -> None:
    graphs = DecodeGraphs(4)
    for _ in graphs.capture(lambda bucket: bucket, torch.zeros):  # type: ignore[arg-type,return-value]  # as in `captured`
        assert graphs.bucket_of(decodes(4)) is None
    assert graphs.bucket_of(decodes(4)) == 4


def test_destroyed_graphs_are_used_no_more(log: list[str]) -> None:
    graphs = DecodeGraphs(4)
    captured(graphs, log)
    log.clear()
    graphs.destroy()
    graphs.destroy()
    assert log == ["reset"] * 3
    assert graphs.bucket_of(decodes(1)) is None
