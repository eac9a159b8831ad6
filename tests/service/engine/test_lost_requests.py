"""NaN in one request: it alone is lost, and what it leaves in its blocks reaches nobody."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from torch import Tensor

from quant.scheme import PRESETS, Scheme
from service.engine.api import FinishReason, SamplingParams
from service.engine.loop import EngineLoop
from service.errors import EngineFailed
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.random_weights import random_decoder
from tests.service.kinds import StartEngine
from tests.support.engines import CPU, PROMPTS, make_engine
from tests.support.grammars import REGISTRY, Only, finished
from tests.support.lateness import start_late
from tests.support.tiny_models import make_model

POISON = 255
"""A token whose embedding is NaN, so that every key and value behind it is."""

HEALTHY = [[token for token in prompt if token != POISON] for prompt in PROMPTS]
SCHEMES = [PRESETS["fp16"], PRESETS["w8a8"], PRESETS["w8a8"].with_kv("int8"), PRESETS["smoothquant-o3"]]


def poisoned_decoder(scheme: Scheme, name: str = "qwen2") -> Decoder:
    decoder = random_decoder(ModelConfig.of(make_model(name).config), scheme, torch.float32, CPU)
    assert not decoder.config.is_tied
    decoder.embedding = decoder.embedding.clone()
    decoder.embedding[POISON] = math.nan
    head = decoder.head
    # No request draws it by chance.
    decoder.head = lambda hidden: head(hidden).index_fill(-1, torch.tensor([POISON]), -1e4)  # type: ignore[assignment]  # any function will do
    return decoder


async def ids_of(engine: EngineLoop, prompt: list[int], params: SamplingParams) -> list[int]:
    return [token.id for token in (await finished(engine, prompt, params))[1]]


async def is_lost(engine: EngineLoop, prompt: list[int], params: SamplingParams) -> str:
    stream = engine.submit(prompt, params, "lost")
    with pytest.raises(EngineFailed) as raised:
        async for _ in stream:
            pass
    assert stream.progress.finish_reason == FinishReason.ABORT
    return raised.value.message


@pytest.mark.parametrize("start", [make_engine, start_late])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_it_is_lost_alone_and_its_blocks_are_clean_for_the_next(scheme: Scheme, start: StartEngine) -> None:
    """Few blocks, each of which was full of NaN when its next owner got it."""
    engine = start(poisoned_decoder(scheme), num_blocks=90, block_size=4, budget=24)
    params = SamplingParams(16, ignore_eos=True)
    random = SamplingParams(16, temperature=1.0, seed=3, ignore_eos=True)
    in_time = SamplingParams(40, ignore_eos=True, grammar=REGISTRY.name(Only({9}, {10}, {POISON}, {11})))

    async def healthy() -> list[list[int]]:
        return await asyncio.gather(*(ids_of(engine, p, random) for p in HEALTHY))

    async def fill_with_nan() -> None:
        for length in (1, 60, 230):
            await is_lost(engine, [POISON] * length, params)
        await asyncio.gather(*(is_lost(engine, [POISON] * 57, params) for _ in range(6)))

    async def run() -> tuple[list[list[int]], list[list[int]], list[list[int]], list[str]]:
        alone = await healthy()
        await fill_with_nan()
        after = await healthy()
        beside = asyncio.ensure_future(healthy())
        told = await asyncio.gather(
            *(is_lost(engine, [5, 6, POISON, *HEALTHY[i], POISON], params) for i in range(4)),
            is_lost(engine, [5, 6], in_time),
        )
        return alone, after, await beside, told

    try:
        alone, after, beside, told = asyncio.run(run())
        assert after == alone
        assert beside == alone
        assert all("token 0 of the answer are NaN" in message for message in told[:4])
        assert "token 3 of the answer are NaN" in told[4]
        assert engine.stats().kv_cache_usage_ratio == 0
        assert engine.failure is None
    finally:
        engine.stop()


def test_nan_in_a_place_of_the_prompt_fails_whoever_asked_for_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that the last row does not feel: a NaN in one row of the last hidden states."""
    decoder = poisoned_decoder(PRESETS["w8a8"])
    norm = decoder.norm

    class OneBadRow:
        def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            y, residual = norm(x, residual)
            assert isinstance(y, Tensor)
            if len(y) == 12:
                y[4] = math.nan
            return y, residual

    monkeypatch.setattr(decoder, "norm", OneBadRow())
    engine = make_engine(decoder)

    async def run() -> tuple[list[int], str]:
        prompt = list(range(10, 22))
        fine = await ids_of(engine, prompt, SamplingParams(3))
        return fine, await is_lost(engine, prompt, SamplingParams(3, prompt_logprobs=1))

    try:
        fine, message = asyncio.run(run())
    finally:
        engine.stop()
    assert len(fine) == 3
    assert "for a token of the prompt are NaN" in message
