"""INT8 answers are the same bits, alone or in a crowd, whole or in pieces, preempted, found in the prefix cache, or
with drafts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quant.scheme import PRESETS, Scheme
from service.engine.api import EngineStats, FinishReason, SamplingParams, Token
from service.engine.device.runner import Runner
from service.engine.drafts.speculation import Speculation
from service.engine.loop import StepRunner
from service.models.config import ModelConfig
from service.models.random_weights import random_decoder
from tests.support.eager import Eager
from tests.support.engines import CPU, collect, make_engine
from tests.support.grammars import EOS, RULES
from tests.support.lateness import LateRunner
from tests.support.padded_runner import pad_steps
from tests.support.tiny_models import make_model

MAX_TOKENS = 6
PARAMS = SamplingParams(MAX_TOKENS, ignore_eos=True, logprobs=0)
# With a float head, whose product is a library's, log-probabilities would differ in their last bits.
SCHEME = PRESETS["w8a8"].with_head("int8")


PLACES = [(CPU, 120), pytest.param((torch.device("cuda"), 500), marks=pytest.mark.gpu)]
"""Where, and how many requests."""


def prompts_of(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts of 2 to 150 tokens; two thirds begin like others."""
    begins = [[rng.randrange(3, 250) for _ in range(size)] for size in (17, 48, 100)]
    prompts = []
    for _ in range(count):
        begin = rng.choice([*begins, *begins, [], [], []])
        prompts.append(begin + [rng.randrange(3, 250) for _ in range(rng.randrange(2, 50))])
    return prompts


def told(tokens: list[Token]) -> list[tuple[int, float]]:
    """Ids and log-probabilities, these to 5 digits: torch's log_softmax rounds a row as it lies among others, to one
    unit in the last place. A single other code anywhere in the model changes the third digit."""
    return [(token.id, round(token.logprob or 0.0, 5)) for token in tokens]


def same(found: list[list[tuple[int, float]]], wanted: list[list[tuple[int, float]]]) -> bool:
    pairs = [(a, b) for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True)]
    return all(a[0] == b[0] and abs(a[1] - b[1]) < 2e-5 for a, b in pairs)


def warm(runner: Runner) -> Runner:
    """On a GPU the steps are graphs."""
    runner.warm_up()
    return runner


def padded(runner: Runner) -> LateRunner:
    """On a CPU the steps are padded as graphs are."""
    pad_steps(runner)
    return LateRunner(runner)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0].type)
@pytest.mark.parametrize("scheme", [SCHEME, SCHEME.with_kv("int8")], ids=lambda scheme: scheme.label)
def test_a_crowd_changes_no_bit(scheme: Scheme, place: tuple[torch.device, int]) -> None:
    device, count = place
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), scheme, torch.float32, device)
    rng = random.Random(0)
    prompts = prompts_of(rng, count)

    def run(together: bool, **limits: Any) -> tuple[list[list[tuple[int, float]]], int, int]:
        engine = make_engine(decoder, wrap=warm, **limits)

        async def one(number: int) -> tuple[list[tuple[int, float]], int]:
            if together:
                await asyncio.sleep(rng.random() * 0.3)
            stream = engine.submit(prompts[number], PARAMS, str(number))
            tokens = [token async for new in stream for token in new]
            return told(tokens), stream.progress.num_cached

        async def go() -> list[tuple[list[tuple[int, float]], int]]:
            if together:
                return await asyncio.gather(*map(one, range(count)))
            return [await one(number) for number in range(count)]

        try:
            answers = asyncio.run(go())
        finally:
            engine.stop()
        return [answer for answer, _ in answers], sum(cached for _, cached in answers), engine.stats().num_preemptions

    alone, num_cached, _ = run(together=False, has_prefix_cache=False, num_blocks=40)
    assert num_cached == 0
    in_turn, num_cached, _ = run(together=False, num_blocks=200)
    assert num_cached > 1000
    assert same(in_turn, alone)
    crowd, num_cached, _ = run(together=True, num_blocks=200, budget=37)
    assert num_cached > 1000
    assert same(crowd, alone)


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("has_prefix_cache", [True, False], ids=["cached", "computed"])
@pytest.mark.parametrize("scheme", [SCHEME, SCHEME.with_kv("int8")], ids=lambda scheme: scheme.label)
def test_preemption_changes_no_bit(scheme: Scheme, has_prefix_cache: bool, device: torch.device) -> None:
    """Prompts that end on, before and behind a block's end; answers of several blocks, put back at any length."""
    decoder = random_decoder(ModelConfig.of(make_model("qwen2").config), scheme, torch.float32, device)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 250) for _ in range(size)] for size in (1, 2, 15, 16, 17, 18, 31, 33, 60, 100)]
    params = SamplingParams(50, ignore_eos=True, logprobs=0)

    def run(num_blocks: int, **limits: Any) -> tuple[list[list[tuple[int, float]]], int]:
        engine = make_engine(decoder, wrap=warm, num_blocks=num_blocks, has_prefix_cache=has_prefix_cache, **limits)

        async def go() -> list[list[Token]]:
            return await asyncio.gather(*(collect(engine, prompt, params, str(n)) for n, prompt in enumerate(prompts)))

        try:
            return [told(answer) for answer in asyncio.run(go())], engine.stats().num_preemptions
        finally:
            engine.stop()

    roomy, num_preemptions = run(200)
    assert num_preemptions == 0
    for limits in ({"num_blocks": 20}, {"num_blocks": 12, "budget": 37}, {"num_blocks": 24, "rows": 10}):
        narrow, num_preemptions = run(**limits)
        assert num_preemptions > 3
        assert same(narrow, roomy), limits


def test_an_answer_goes_on_from_the_cache_with_the_same_bits() -> None:
    """The next turn of a conversation, whose beginning holds what was generated."""
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), PRESETS["w8a8"], torch.float32, CPU)
    prompt = [(7 * i) % 250 + 3 for i in range(40)]
    engine = make_engine(decoder)

    async def go() -> tuple[list[Token], list[Token]]:
        first = await collect(engine, prompt, SamplingParams(30, ignore_eos=True))
        again = prompt + [token.id for token in first[:20]]
        return first[20:], await collect(engine, again, SamplingParams(10, ignore_eos=True))

    try:
        rest, continued = asyncio.run(go())
    finally:
        engine.stop()
    assert [token.id for token in continued] == [token.id for token in rest]


def repetitive(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts of 3 to 60 tokens that repeat a few."""
    parts = [[rng.randrange(3, 250) for _ in range(rng.randrange(1, 9))] for _ in range(count)]
    return [(part * 60)[: rng.randrange(3, 60)] for part in parts]


@pytest.mark.parametrize("wrap", [None, LateRunner, padded], ids=["read at once", "read late", "padded"])
@pytest.mark.parametrize("num_blocks", [200, 50], ids=["roomy", "preempting"])
@pytest.mark.parametrize("scheme", [SCHEME, SCHEME.with_kv("int8"), PRESETS["fp16"]], ids=lambda scheme: scheme.label)
def test_drafts_change_no_answer(scheme: Scheme, num_blocks: int, wrap: Callable[[Runner], StepRunner] | None) -> None:
    """Greedy and drawn, held to a grammar, penalized, biased, ended by a token, with log-probabilities, cancelled."""
    decoder = random_decoder(ModelConfig.of(make_model("qwen2").config), scheme, torch.float32, CPU)
    rng = random.Random(0)
    prompts = repetitive(rng, 24)
    kinds = [
        SamplingParams(40, logprobs=0),
        SamplingParams(40, ignore_eos=True),
        SamplingParams(40, temperature=0.4, seed=5, top_k=20),
        SamplingParams(30, temperature=1.0, seed=1, grammar=RULES),
        SamplingParams(40, repetition_penalty=1.2),
        SamplingParams(40, temperature=0.2, seed=3, logprobs=2, prompt_logprobs=1),
        SamplingParams(40, logit_bias=((9, 4.0),), min_tokens=15, held_ids=(EOS, 9), end_ids=(9, 30)),
        SamplingParams(40, presence_penalty=0.5, frequency_penalty=0.2),
    ]

    def run(speculation: Speculation | None) -> tuple[list[list[tuple[int, float]]], EngineStats]:
        engine = make_engine(decoder, wrap=wrap, num_blocks=num_blocks, rows=48, speculation=speculation, eos_ids={EOS})

        async def one(number: int) -> list[tuple[int, float]]:
            await asyncio.sleep(0.02 * (number // 6))
            stream, tokens = engine.submit(prompts[number], kinds[number % len(kinds)], str(number)), list[Token]()
            async for new in stream:
                tokens += new
                if number % 5 == 4 and len(tokens) >= 12:
                    stream.finish(FinishReason.STOP)
            return told(tokens[:12] if number % 5 == 4 else tokens)

        async def go() -> list[list[tuple[int, float]]]:
            return await asyncio.gather(*map(one, range(len(prompts))))

        try:
            return asyncio.run(go()), engine.stats()
        finally:
            engine.stop()

    wanted, without = run(None)
    found, stats = run(Eager(3, 48))
    assert [[token_id for token_id, _ in answer] for answer in found] == [
        [token_id for token_id, _ in answer] for answer in wanted
    ]
    assert scheme.label == "fp16" or same(found, wanted)
    assert (20 if num_blocks == 200 else 0) < stats.num_accepted_tokens < stats.num_draft_tokens
    assert (stats.num_preemptions > 0) == (num_blocks < 200)
    assert without.num_draft_tokens == 0


@pytest.mark.parametrize("wrap", [None, LateRunner], ids=["read at once", "read late"])
def test_drafts_change_no_answer_that_is_penalized_biased_or_held(wrap: Callable[[Runner], StepRunner] | None) -> None:
    decoder = random_decoder(ModelConfig.of(make_model("qwen2").config), SCHEME, torch.float32, CPU)
    prompts = repetitive(random.Random(1), 8)
    kinds = [
        SamplingParams(40, presence_penalty=0.5, frequency_penalty=0.2),
        SamplingParams(40, end_ids=(7, 20), held_ids=(EOS, 7, 20), min_tokens=9, logit_bias=((9, 3.0), (20, 2.0))),
        SamplingParams(40, logit_bias=((9, 100.0),)),
    ]

    def run(speculation: Speculation | None) -> tuple[list[list[int]], EngineStats]:
        engine = make_engine(decoder, wrap=wrap, speculation=speculation, eos_ids={EOS})

        async def go() -> list[list[Token]]:
            return await asyncio.gather(
                *(collect(engine, prompt, kinds[n % 3], str(n)) for n, prompt in enumerate(prompts))
            )

        try:
            return [[token.id for token in tokens] for tokens in asyncio.run(go())], engine.stats()
        finally:
            engine.stop()

    wanted, _ = run(None)
    found, stats = run(Eager(3, 16))
    assert found == wanted
    assert all(answer == [9] * 40 for answer in wanted[2::3])
    assert stats.num_accepted_tokens > 0
