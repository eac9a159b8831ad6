"""Sampling against the definition of each filter, and the independence of requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.engine.api import SamplingParams
from service.engine.device import sampler
from service.engine.device.sampler import Choice, Fault, greedy, sample
from service.engine.device.sampling import SamplingBuilder, uniform
from service.engine.request import Request
from service.engine.scheduler import Chunk
from tests.support.thread_ranks import ThreadRanks, on_ranks

CPU = torch.device("cpu")


def draw(
    logits: Tensor,
    *params: SamplingParams,
    seeds: Sequence[int] | None = None,
    index: int = 0,
    seen: Tensor | None = None,
    counts: Tensor | None = None,
) -> Choice:
    seeds = seeds or range(len(params))
    requests = [Request(str(i), [1], p, 0.0, seed) for i, (p, seed) in enumerate(zip(params, seeds, strict=True))]
    chunks = [Chunk(request, 0, 1, True, index) for request in requests]
    return sample(logits, SamplingBuilder(len(chunks), logits.shape[-1], CPU).build(chunks), seen, counts)


def frequencies(logits: Tensor, params: SamplingParams, num_draws: int = 4000) -> torch.Tensor:
    ids = draw(logits.expand(num_draws, -1), *[params] * num_draws).ids
    return torch.bincount(ids, minlength=logits.shape[-1]) / num_draws


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])


def test_temperature_zero_is_greedy_even_beside_random_rows() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0.0 if i % 2 else 1.5) for i in range(8)]
    assert torch.equal(draw(logits, *params).ids[1::2], logits.argmax(-1)[1::2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    found = frequencies(LOGITS, SamplingParams(temperature=temperature))
    assert (found - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
        # softmax: .557 .205 .124 .075 .028 .010; a token stays while the ones before it sum to less than top_p.
        ({"top_p": 0.1}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.9}, {0, 1, 2, 3}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 0.04}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.99, "min_p": 0.01}, {0, 1}),
    ],
)
def test_filters_keep_exactly_their_tokens(params: dict[str, Any], kept: set[int]) -> None:
    found = frequencies(LOGITS, SamplingParams(temperature=1.0, **params))
    assert set(found.nonzero().flatten().tolist()) == kept
    expected = LOGITS.softmax(-1).where(torch.tensor([i in kept for i in range(6)]), 0.0)
    assert (found - expected / expected.sum()).abs().max() < 0.03


def test_a_few_rows_at_a_time_give_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0.5 + i / 5, top_k=3 * (i % 3), top_p=1 - i / 20) for i in range(9)]
    together = draw(logits, *params).ids
    for num_logits in (50, 199, 400):
        monkeypatch.setattr(sampler, "SLICE_LOGITS", num_logits)
        assert torch.equal(draw(logits, *params).ids, together)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(16, 300, generator=generator)
    params = [SamplingParams(temperature=0.5 + 0.1 * i, top_k=i, top_p=1 - 0.03 * i) for i in range(16)]
    together = draw(logits, *params).ids
    alone = [draw(logits[i : i + 1], params[i], seeds=[i]).ids.item() for i in range(16)]
    assert together.tolist() == alone


def test_randomness_is_a_function_of_seed_and_index() -> None:
    assert uniform(5, 3) == uniform(5, 3)
    values = {uniform(seed, index) for seed in range(40) for index in range(40)}
    assert len(values) == 1600
    assert min(values) >= 0
    assert max(values) < 1
    assert abs(sum(values) / 1600 - 0.5) < 0.03


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[4.0, 3.0, -1.0, -1.5]])
    seen = torch.tensor([[True, False, True, False]])
    ids = draw(logits, SamplingParams(repetition_penalty=2.0), seen=seen).ids
    assert ids.item() == 1  # 4 / 2 < 3
    ids = draw(torch.tensor([[-9.0, -9.0, -1.0, -1.5]]), SamplingParams(repetition_penalty=2.0), seen=seen).ids
    assert ids.item() == 3  # -1 * 2 < -1.5


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    choice = draw(logits, SamplingParams(temperature=3.0, logprobs=0), SamplingParams(logprobs=4))
    expected = logits.log_softmax(-1)
    assert choice.logprobs is not None
    assert choice.top_ids is not None
    assert torch.equal(choice.logprobs, expected.gather(-1, choice.ids[:, None])[:, 0])
    assert torch.equal(choice.top_ids[1], expected[1].topk(4).indices)


def logits_of_all() -> Tensor:
    """Rows with one largest logit, equal ones on the same and on other ranks, NaN, +inf, and nothing but -inf."""
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    logits[2, [1, 2]] = logits[3, [1, 6]] = logits[4, [3, 4]] = 9.0
    logits[5, 6], logits[6, 0], logits[7] = math.nan, math.inf, -math.inf
    return logits


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_likeliest_token_is_found_from_each_ranks_maximum(size: int) -> None:
    logits, width = logits_of_all(), -(-7 // size)
    padded = F.pad(logits, (0, width * size - 7), value=-math.inf)
    want, gathered = greedy(logits), []

    class Watched(ThreadRanks):
        def all_gather(self, x: Tensor) -> Tensor:
            gathered.append(x.shape)
            return super().all_gather(x)

    for rank, found in enumerate(
        on_ranks(size, lambda ranks: greedy(padded[:, ranks.rank * width :][:, :width], ranks), Watched)
    ):
        assert torch.equal(found.faults, want.faults), rank
        is_right = want.faults == Fault.NONE
        assert torch.equal(found.ids[is_right], want.ids[is_right]), rank
    assert set(gathered) == {(9, 2)}
