"""The log-probabilities of prompts, against transformers: in chunks, in company, computed again, in slices."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.scheme import PRESETS
from service.engine.api import FinishReason, Progress, SamplingParams, Token
from service.engine.device import prompt_logprobs
from service.engine.device.runner import Runner
from service.engine.loop import EngineLoop
from service.engine.messages import Logprob
from service.engine.request import Request
from service.engine.scheduler import Scheduler, Step, StepResults
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.loader import load_decoder
from service.models.random_weights import random_decoder
from service.tools.evaluate.speed import drive
from tests.service.kinds import StartEngine, Tiny
from tests.support.engines import CPU, PROMPTS, make_engine
from tests.support.lateness import start_late
from tests.support.requests import new_request
from tests.support.tiny_models import make_model

CHUNKED = {"budget": 16, "block_size": 4, "num_blocks": 500}
PREEMPTING = {"block_size": 4, "num_blocks": 70, "budget": 24}


def params_of(i: int) -> SamplingParams:
    """Every third request does not ask; the others want 0, 1, 2, .. likeliest."""
    return SamplingParams(max_tokens=16, ignore_eos=True, prompt_logprobs=None if i % 3 == 2 else i)


def run(engine: EngineLoop) -> list[tuple[Progress, list[Token]]]:
    """Every prompt at once: the requests and their tokens."""

    async def one(i: int) -> tuple[Progress, list[Token]]:
        stream = engine.submit(PROMPTS[i], params_of(i), str(i))
        first = await anext(aiter(stream))
        assert len(stream.progress.prompt_logprobs) == (0 if i % 3 == 2 else len(PROMPTS[i]) - 1), (
            "not complete in time"
        )
        return stream.progress, first + [token async for tokens in stream for token in tokens]

    async def together() -> list[tuple[Progress, list[Token]]]:
        return await asyncio.gather(*(one(i) for i in range(len(PROMPTS))))

    try:
        return asyncio.run(together())
    finally:
        engine.stop()


def check(i: int, progress: Progress, model: PreTrainedModel) -> None:
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPTS[i]])).logits[0].log_softmax(-1)
    assert len(progress.prompt_logprobs) == len(PROMPTS[i]) - 1
    for place, (row, token) in enumerate(zip(expected, progress.prompt_logprobs, strict=False)):
        assert token.id == PROMPTS[i][place + 1]
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        likeliest = row.topk(params_of(i).prompt_logprobs)
        assert [i for i, _ in token.top_logprobs] == likeliest.indices.tolist()
        assert [x for _, x in token.top_logprobs] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("start", [make_engine, start_late])
@pytest.mark.parametrize("limits", [{}, CHUNKED, PREEMPTING], ids=["whole", "chunked", "preempting"])
def test_they_equal_those_of_transformers(tiny: Tiny, limits: dict[str, int], start: StartEngine) -> None:
    model, folder = tiny("llama")
    engine = start(load_decoder(folder, torch.float32, CPU), **limits)
    for i, (progress, _) in enumerate(run(engine)):
        if i % 3 == 2:
            assert progress.prompt_logprobs == ()
        else:
            check(i, progress, model)
    assert (engine.stats().num_preemptions > 0) == (limits is PREEMPTING)


def watch_head(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the head is given at a time, from now on."""
    sizes: list[int] = []
    head = decoder.head

    def watched(hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return head(hidden)

    monkeypatch.setattr(decoder, "head", watched)
    return sizes


def test_few_rows_at_a_time_give_the_same(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the head is never given more of them than a slice holds."""
    model, folder = tiny("llama")
    decoder = load_decoder(folder, torch.float32, CPU)
    monkeypatch.setattr(prompt_logprobs, "SLICE_LOGITS", 3 * decoder.config.vocab_size + 1)
    sizes = watch_head(decoder, monkeypatch)
    progress, _ = run(make_engine(decoder, rows=3))[10]
    assert max(sizes) == 3
    check(10, progress, model)


def test_those_who_do_not_ask_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product with the head in each step, and of the sampling rows alone."""
    config = ModelConfig.of(make_model("llama").config)
    decoder = random_decoder(config, PRESETS["fp16"], torch.float32, CPU)
    sizes = watch_head(decoder, monkeypatch)
    plan, runner = (
        Scheduler(num_blocks=64, block_size=4, max_num_requests=4, max_batched_tokens=16),
        Runner(decoder, num_blocks=64, block_size=4, max_requests=4, max_tokens=16),
    )
    plan.add(new_request("a", 40, 5))
    expected = [sum(chunk.samples for chunk in step.chunks) for step, _ in drive(plan, runner)]
    assert sizes == expected


def test_neighbours_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.of(make_model("llama").config)
    decoder = random_decoder(config, PRESETS["w8a8"], torch.float32, CPU)
    found = []
    for asked in (None, 5):
        plan, runner = (
            Scheduler(num_blocks=64, block_size=16, max_num_requests=8, max_batched_tokens=64),
            Runner(decoder, num_blocks=64, block_size=16, max_requests=8, max_tokens=64),
        )
        neighbour = new_request("n", 20, 12, temperature=1.0, logprobs=2)
        plan.add(new_request("a", 90, 3, prompt_logprobs=asked))
        plan.add(neighbour)
        logprobs: list[Logprob] = []
        commit = plan.commit

        def committed(
            step: Step,
            results: StepResults,
            logprobs: list[Logprob] = logprobs,
            commit: Callable[[Step, StepResults], list[tuple[int, Request]]] = commit,
            neighbour: Request = neighbour,
        ) -> list[tuple[int, Request]]:
            sampled = [chunk.request for chunk in step.chunks if chunk.samples]
            logprobs += [results.logprobs[place] for place, request in enumerate(sampled) if request is neighbour]
            return commit(step, results)

        monkeypatch.setattr(plan, "commit", committed)
        for _ in drive(plan, runner):
            pass
        assert neighbour.finish_reason == FinishReason.LENGTH
        found.append((neighbour.output_ids, logprobs))
        assert len(logprobs) == 12
    assert found[0] == found[1]


def test_a_place_that_is_not_finite_is_nan_and_no_other() -> None:
    logits = torch.randn(4, 9)
    logits[1, 3], logits[2, 3] = math.nan, math.inf
    logprobs, _, _ = prompt_logprobs._score(logits, torch.tensor([0, 0, 0, 0]), 2)
    assert logprobs.isnan().tolist() == [False, True, True, False]
    # Two ways to the same sum of nine terms: a few roundings of a number below 8.
    assert (logprobs - logits.log_softmax(-1)[:, 0])[::3].abs().max() < 8 * 2.0**-22
