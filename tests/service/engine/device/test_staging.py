"""Staging: two sets in turn, made once; and what the device gets of a step's parameters through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.engine.api import SamplingParams
from service.engine.device.sampler import sample
from service.engine.device.sampling import SamplingBuilder, uniform
from service.engine.device.staging import Staging
from service.engine.request import Request
from service.engine.scheduler import Chunk
from tests.support.engines import CPU

DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES, ids=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen: torch.device = request.param
    return chosen


def test_two_sets_take_turns_and_are_never_made_anew(device: torch.device) -> None:
    staging = Staging(device, 64)
    addresses = [staging.take(size).data_ptr() for size in (64, 1, 40, 64, 2, 8)]
    assert len(set(addresses[:2])) == 2
    assert addresses == addresses[:2] * 3


def test_what_is_sent_outlives_the_next_use_of_the_other_set(device: torch.device) -> None:
    staging, sent = Staging(device, 4), []
    for value in range(2):
        taken = staging.take(4)
        taken.fill_(value)
        assert taken.is_pinned() == (device.type == "cuda")
        sent.append(staging.send(taken))
    assert [t.device.type for t in sent] == [device.type] * 2
    assert [t.tolist() for t in sent] == [[0] * 4, [1] * 4]


def test_a_set_grows_when_more_is_asked_of_it(device: torch.device) -> None:
    staging = Staging(device)
    first, second = staging.take(100), staging.take(3)
    assert (len(first), len(second)) == (100, 3)
    assert staging.take(128).data_ptr() == first.data_ptr(), "grown to a power of two"
    assert len(staging.take(1000)) == 1000
    assert staging.take(120).data_ptr() == first.data_ptr()


SINGLES = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def chunks_of(*params: SamplingParams) -> list[Chunk]:
    return [Chunk(Request(str(i), [1], p, 0.0, 40 + i), 0, 1, True, 3 + i) for i, p in enumerate(params)]


def test_the_device_gets_what_the_requests_say(device: torch.device) -> None:
    """Row by row in the type of each column, in steps of other sizes one after the other."""
    builder = SamplingBuilder(9, 20, device)
    for size in (9, 1, 5, 8):
        params = [
            SamplingParams(
                temperature=i % 3 / 3,
                top_k=2**31 + i,
                top_p=1 - i / 7,
                min_p=i / 11,
                repetition_penalty=1 + i / 13,
                presence_penalty=i / 17,
                frequency_penalty=i / 19,
            )
            for i in range(2, 2 + size)
        ]
        found = builder.build(chunks_of(*params)).params
        assert found is not None
        for name in SINGLES:
            column = getattr(found, name)
            assert column.dtype == torch.float32
            assert torch.equal(column.cpu(), torch.tensor([getattr(p, name) for p in params], dtype=torch.float32))
        assert found.top_k.tolist() == [p.top_k for p in params]
        drawn = [uniform(40 + i, 3 + i) if p.temperature > 0 else 0 for i, p in enumerate(params)]
        assert found.uniform.tolist() == drawn


def test_greedy_steps_send_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever filters such requests name; with log-probabilities too."""
    builder = SamplingBuilder(4, 20, device)
    monkeypatch.setattr(Staging, "take", lambda *_: pytest.fail("a greedy step took staging memory"))
    batch = builder.build(chunks_of(SamplingParams(top_k=3, top_p=0.5), SamplingParams(), SamplingParams(logprobs=2)))
    assert batch.params is None
    assert batch.constraint is None
    assert batch.num_top_logprobs == 2
    logits = torch.randn(3, 20, device=device)
    assert torch.equal(sample(logits, batch, None).ids, logits.argmax(-1))


def test_any_top_k_that_a_client_may_name() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    ids = []
    for top_k in (30, 2**64 - 1):
        params = SamplingParams(temperature=1.0, top_k=top_k)
        ids.append(sample(logits, SamplingBuilder(2, 30, CPU).build(chunks_of(params, params)), None).ids.tolist())
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.5}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}],
    ids=str,
)
def test_one_row_that_is_not_plain_brings_the_parameters_of_all(params: dict[str, Any]) -> None:
    batch = SamplingBuilder(2, 30, CPU).build(chunks_of(SamplingParams(), SamplingParams(**params)))
    assert batch.params is not None
    assert len(batch.params.temperature) == 2
    assert (batch.is_random, batch.is_penalized) == ("temperature" in params, "repetition_penalty" in params)
    assert batch.counts_tokens == ("presence_penalty" in params or "frequency_penalty" in params)
