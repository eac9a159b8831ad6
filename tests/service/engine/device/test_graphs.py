"""Which graph runs a step, and when there is one. What a graph computes: test_gpu.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from service.engine.device.graphs import StepGraphs
from service.engine.scheduler import Chunk, Step
from service.engine.shapes import Shape, shapes_of
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


def prompt(length: int) -> Step:
    return Step([Chunk(new_request("0", length), 0, length, True, 0)])


def test_a_shape_that_a_larger_one_beats_is_not_used(log: list[str]) -> None:
    graphs = StepGraphs[Shape](max_tokens=640, max_requests=16)
    captured(graphs, log)
    times_s = {shape: 1e-3 * (1 + shape.num_tokens / 64) for shape in graphs.shapes}
    assert graphs.shape_of(prompt(520)) == Shape(576, 16)
    graphs.leave_out_slow(times_s | {Shape(576, 16): 0.0112, Shape(448, 16): 0.00801, Shape(512, 16): 0.008})
    # 640 takes 0.011, within the noise of 0.0112; then 0.0114.
    assert graphs.shape_of(prompt(520)) == Shape(576, 16)
    assert graphs.shape_of(prompt(400)) == Shape(448, 16)
    graphs.leave_out_slow(times_s | {Shape(576, 16): 0.0114})
    assert graphs.shape_of(prompt(520)) == Shape(640, 16)
    assert graphs.shape_of(prompt(512)) == Shape(512, 16)
    assert graphs.shape_of(decodes(3)) == decode(4)


def decode(count: int) -> Shape:
    return Shape(count, count, is_decode=True)


def captured(graphs: StepGraphs[Shape], log: list[str]) -> list[Shape]:
    """Captures with each shape as its own output."""

    def blank(shape: Shape) -> Shape:
        log.append(f"blank {shape.num_tokens}")
        return shape

    return list(graphs.capture(blank, lambda batch: batch))  # type: ignore[arg-type,return-value]


def test_shapes_reach_the_largest_step_and_no_further() -> None:
    assert shapes_of(40, 20) == [
        *map(decode, (1, 2, 4, 8, 16, 20)),
        *(Shape(16, 16), Shape(32, 16), Shape(32, 20), Shape(40, 16), Shape(40, 20)),
    ]
    largest = shapes_of(1 << 17, 4096)
    assert max(shape for shape in largest if shape.is_decode) == decode(512)
    assert max(shape for shape in largest if not shape.is_decode) == Shape(8192, 512)


def test_every_step_within_the_limits_has_a_shape_that_holds_it(log: list[str]) -> None:
    graphs = StepGraphs[Shape](700, 70)
    captured(graphs, log)
    prompt = new_request("p", 800)
    for num_requests in range(1, 71):
        assert graphs.shape_of(decodes(num_requests)) in graphs.shapes
        others = decodes(num_requests - 1).chunks
        for num_tokens in range(max(2, num_requests), 701):
            shape = graphs.shape_of(Step([*others, Chunk(prompt, 0, num_tokens - len(others), False, 0)]))
            assert shape is not None
            assert not shape.is_decode
            assert num_tokens <= shape.num_tokens <= max(16, 2 * num_tokens)
            assert shape.num_requests >= num_requests


def test_the_smallest_graph_that_holds_a_step_runs_it(log: list[str]) -> None:
    graphs = StepGraphs[Shape](20, 20)
    assert graphs.shape_of(decodes(1)) is None
    assert captured(graphs, log) == sorted(graphs.shapes, reverse=True), "the largest first"
    assert log[:3] == ["blank 20", "begin", "end"], "a blank step is made before a capture"
    assert [graphs.shape_of(decodes(n)) for n in (1, 2, 3, 5, 9, 17, 20)] == [
        decode(n) for n in (1, 2, 4, 8, 16, 20, 20)
    ]
    assert graphs.shape_of(decodes(21)) is None
    assert graphs.shape_of(decodes(3, length=2)) == Shape(16, 16)
    assert graphs.shape_of(decodes(3, samples=False)) == Shape(16, 16), "one row that samples nothing is no decode"
    assert graphs.shape_of(decodes(17, samples=False)) == Shape(20, 20)
    assert graphs.shape_of(decodes(3, length=7)) is None, "more tokens than any shape"


def test_replay_gives_the_output_of_its_shape(log: list[str]) -> None:
    graphs = StepGraphs[Shape](8, 8)
    captured(graphs, log)
    log.clear()
    assert graphs.replay(decode(4)) == decode(4)
    assert log == ["replay"]


def test_no_graph_is_used_before_all_are_there(log: list[str]) -> None:
    graphs = StepGraphs[Shape](4, 4)
    for _ in graphs.capture(lambda shape: shape, lambda batch: batch):  # type: ignore[arg-type,return-value]
        assert graphs.shape_of(decodes(4)) is None
    assert graphs.shape_of(decodes(4)) == decode(4)


def test_destroyed_graphs_are_used_no_more(log: list[str]) -> None:
    graphs = StepGraphs[Shape](4, 4)
    captured(graphs, log)
    log.clear()
    graphs.destroy()
    graphs.destroy()
    assert log == ["reset"] * len(graphs.shapes)
    assert graphs.shape_of(decodes(1)) is None


@pytest.mark.parametrize("is_enabled", [True, False])
def test_nothing_is_collected_during_a_capture(is_enabled: bool, log: list[str]) -> None:
    """What a collection destroys may be a graph, which ends a capture. Between captures other engines take steps."""
    graphs: StepGraphs[bool] = StepGraphs(64, 4)
    (gc.enable if is_enabled else gc.disable)()
    try:
        for _ in graphs.capture(lambda shape: shape, lambda _: gc.isenabled()):  # type: ignore[arg-type,return-value]
            assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
    assert not any(captured.output for captured in graphs._captured.values())
