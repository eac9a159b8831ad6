"""Steps in the device buffers that captured graphs read."""

from __future__ import annotations

import pytest
import torch

from service.engine.device.batch import BatchBuilder
from service.engine.scheduler import Scheduler, StepResults
from service.engine.step_table import StepTableBuilder, TableLayout
from tests.support.engines import CPU
from tests.support.requests import new_request


@pytest.fixture(params=[CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def batches(request: pytest.FixtureRequest) -> BatchBuilder:
    return BatchBuilder(TableLayout(max_tokens=24, max_requests=6, max_blocks=16), request.param)


def test_the_device_gets_the_numbers_of_each_step_in_the_same_place(batches: BatchBuilder) -> None:
    tables = StepTableBuilder(batches._layout, 4)
    plan = Scheduler(num_blocks=90, block_size=4, max_num_requests=6, max_batched_tokens=24)
    for i in range(5):
        plan.add(new_request(str(i), 3 + 4 * i, 12))
    addresses, num_steps = set(), 0
    while (step := plan.schedule(0.0)) is not None:
        table = tables.build(step, batches.numbers(), 6 if step.is_decode else None)
        batch = batches.build(table)
        for name in ("token_ids", "from_row", "sample_index", "sample_rows"):
            assert getattr(batch, name).tolist() == getattr(table, name).tolist()
        for name in ("positions", "slots", "query_starts", "context_lens"):
            assert getattr(batch.rows, name).tolist() == getattr(table, name).tolist()
        num_tables, width = table.block_tables.shape
        assert batch.rows.block_tables.shape == (len(table.context_lens), 16), "grids depend on it"
        assert batch.rows.block_tables[:num_tables, :width].tolist() == table.block_tables.tolist()
        assert batch.rows.max_query_len == table.max_query_len
        addresses.add((batch.token_ids.data_ptr(), batch.rows.slots.data_ptr(), batch.rows.block_tables.data_ptr()))
        plan.commit(step, StepResults(0.0, [7 + num_steps] * len(table.sample_index)))
        num_steps += 1
    assert num_steps > 12
    assert len(addresses) == 1


@pytest.mark.parametrize(("num_requests", "query_len"), [(6, 1), (1, 24), (3, 5)])
def test_a_blank_step_writes_no_slot_and_samples_nothing(
    batches: BatchBuilder, num_requests: int, query_len: int
) -> None:
    batch = batches.blank(num_requests, query_len)
    num_tokens = num_requests * query_len
    assert batch.token_ids.tolist() == [0] * num_tokens
    assert batch.from_row.tolist() == batch.rows.slots.tolist() == [-1] * num_tokens
    assert batch.rows.positions.tolist() == list(range(query_len)) * num_requests
    assert batch.rows.query_starts.tolist() == list(range(0, num_tokens + 1, query_len))
    assert batch.rows.context_lens.tolist() == [query_len] * num_requests
    assert batch.rows.max_query_len == query_len
    assert not batch.rows.block_tables.any()
    assert batch.rows.block_tables.shape == (num_requests, 16)
    assert len(batch.sample_index) == len(batch.sample_rows) == 0
