"""Steps in the device buffers that captured graphs read."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from service.engine.device.batch import BatchBuilder
from service.engine.scheduler import Scheduler, StepResults
from service.engine.shapes import Shape
from service.engine.step_table import StepTableBuilder, TableLayout
from tests.support.engines import CPU
from tests.support.requests import new_request


@pytest.fixture(params=[CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def batches(request: pytest.FixtureRequest) -> BatchBuilder:
    return BatchBuilder(TableLayout(max_tokens=24, max_requests=6, max_blocks=16), request.param, 2, has_drafts=False)


def test_the_device_gets_the_numbers_of_each_step_in_the_same_place(batches: BatchBuilder) -> None:
    tables = StepTableBuilder(batches._layout, 4)
    plan = Scheduler(num_blocks=90, block_size=4, max_num_requests=6, max_batched_tokens=24)
    for i in range(5):
        plan.add(new_request(str(i), 3 + 4 * i, 12))
    addresses, num_steps = set(), 0
    while (step := plan.schedule(0.0)) is not None:
        table = tables.build(step, batches.numbers(), Shape(6, 6, is_decode=True) if step.is_decode else None)
        batch = batches.build(table)
        for name in ("token_ids", "from_row", "sample_index", "sample_rows"):
            assert getattr(batch, name).tolist() == getattr(table, name).tolist()
        for name in ("positions", "slots", "query_starts", "context_lens"):
            assert getattr(batch.rows, name).tolist() == getattr(table, name).tolist()
        num_tables, width = table.block_tables.shape
        assert batch.rows.block_tables.shape == (len(table.context_lens), 16), "grids depend on it"
        assert batch.rows.block_tables[:num_tables, :width].tolist() == table.block_tables.tolist()
        assert batch.rows.is_decode == batch.rows.is_alone == table.is_decode
        addresses.add((batch.token_ids.data_ptr(), batch.rows.slots.data_ptr(), batch.rows.block_tables.data_ptr()))
        plan.commit(step, StepResults(0.0, [7 + num_steps] * sum(chunk.samples for chunk in step.chunks)))
        num_steps += 1
    assert num_steps > 12
    assert len(addresses) == 1


def test_more_kinds_of_steps_than_views_are_kept(batches: BatchBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.device.batch.MAX_VIEWS", 2)
    test_the_device_gets_the_numbers_of_each_step_in_the_same_place(batches)
    assert len(batches._copies) == 2
    assert len(batches._views) <= 2


@pytest.mark.parametrize(
    ("shape", "query_len", "query_starts"),
    [
        (Shape(6, 6, is_decode=True), 1, [0, 1, 2, 3, 4, 5, 6]),
        (Shape(24, 1), 24, [0, 24]),
        (Shape(15, 3), 5, [0, 5, 10, 15]),
        (Shape(20, 4), 12, [0, 12, 20, 20, 20]),
        (Shape(24, 2), 8, [0, 8, 16]),
    ],
    ids=["decode", "prompt", "prompts", "last one shorter", "rows of no request"],
)
def test_a_blank_step_writes_no_slot_and_samples_for_nobody(
    batches: BatchBuilder, shape: Shape, query_len: int, query_starts: list[int]
) -> None:
    batch = batches.blank(shape, query_len)
    assert batch.token_ids.tolist() == [0] * shape.num_tokens
    assert batch.from_row.tolist() == batch.rows.slots.tolist() == [-1] * shape.num_tokens
    assert batch.rows.positions.tolist() == [row % query_len for row in range(shape.num_tokens)]
    assert batch.rows.query_starts.tolist() == query_starts
    assert batch.rows.context_lens.tolist() == [stop - start for start, stop in pairwise(query_starts)]
    assert batch.rows.is_decode == shape.is_decode
    assert not batch.rows.block_tables.any()
    assert batch.rows.block_tables.shape == (shape.num_requests, 16)
    assert batch.sample_index.tolist() == [0] * shape.num_requests
    assert batch.sample_rows.tolist() == [6] * shape.num_requests, "the row behind all requests"
