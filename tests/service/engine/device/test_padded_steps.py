"""Steps padded to the shapes of graphs: prompts, chunks, decodes and mixtures give the tokens of unpadded steps."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quant.scheme import PRESETS, Scheme
from service.engine.api import Progress, SamplingParams, Token
from service.engine.device.runner import Runner
from service.engine.scheduler import Step
from service.engine.shapes import Shape
from service.engine.step_table import Ints, StepTable
from service.errors import EngineFailed
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.random_weights import random_decoder
from tests.support.engines import CPU, PROMPTS, collect, collect_all, make_engine
from tests.support.grammars import EOS, RULES, finished
from tests.support.lateness import LateRunner
from tests.support.padded_runner import PaddedSteps, pad_steps
from tests.support.tiny_models import make_model

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
BLOCK_SIZE = 16
INT8_KV = PRESETS["w8a8"].with_kv("int8")


def decoder_of(scheme: Scheme, name: str = "llama") -> Decoder:
    return random_decoder(ModelConfig.of(make_model(name).config), scheme, torch.float32, CPU)


class Padded:
    """Makes an engine's runner pad, and its results come one step late, as a GPU's do.

    wrong: a column of the step's table whose padding is overwritten: slots with those of the requests' first keys,
        which are then lost, and sample_rows with 0.
    """

    steps: PaddedSteps

    def __init__(self, wrong: str | None = None) -> None:
        self._wrong = wrong

    def __call__(self, runner: Runner) -> LateRunner:
        self.steps = pad_steps(runner)
        if self._wrong is not None:
            column = self._wrong
            build = runner._tables.build

            def spoilt(step: Step, numbers: Ints, shape: Shape | None = None) -> StepTable:
                table = build(step, numbers, shape)
                num_samples = sum(chunk.samples for chunk in step.chunks)
                if column == "sample_rows":
                    table.sample_rows[num_samples:] = 0
                else:
                    padding = table.slots[step.num_tokens :]
                    padding[:] = np.resize(table.block_tables[::-1, 0], len(padding)) * BLOCK_SIZE
                return table

            runner._tables.build = spoilt  # type: ignore[method-assign]
        return LateRunner(runner)


def told(decoder: Decoder, wrap: Padded | None) -> list[list[Token]]:
    """Answers with their log-probabilities, which show keys that are lost before any token does."""
    engine = make_engine(decoder, wrap=wrap)
    params = replace(PARAMS, logprobs=0)

    async def go() -> list[list[Token]]:
        return await asyncio.gather(*(collect(engine, prompt, params) for prompt in PROMPTS))

    try:
        return asyncio.run(go())
    finally:
        engine.stop()


def distance(found: list[list[Token]], wanted: list[list[Token]]) -> float:
    """The largest difference of log-probabilities; infinite where the ids part."""
    pairs = [(a, b) for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True)]
    return max(abs((a.logprob or 0.0) - (b.logprob or 0.0)) if a.id == b.id else float("inf") for a, b in pairs)


def answers(decoder: Decoder, params: SamplingParams, wrap: Padded | None, **limits: Any) -> list[list[int]]:
    engine = make_engine(decoder, wrap=wrap, **limits)
    try:
        return asyncio.run(collect_all(engine, PROMPTS, params))
    finally:
        engine.stop()


@pytest.mark.parametrize("limits", [{}, {"budget": 23, "rows": 5}, {"num_blocks": 18}], ids=["", "small", "preempting"])
@pytest.mark.parametrize("scheme", [PRESETS["w8a8"], INT8_KV], ids=lambda scheme: scheme.label)
def test_padding_does_not_change_the_tokens(scheme: Scheme, limits: dict[str, Any]) -> None:
    decoder, padded = decoder_of(scheme), Padded()
    assert answers(decoder, PARAMS, padded, **limits) == answers(decoder, PARAMS, None, **limits)
    kinds = {shape.is_decode for shape in padded.steps.used}
    assert kinds == {True, False}
    assert sum(padded.steps.used.values()) > 12


@pytest.mark.parametrize("name", ["gemma2", "opt", "gpt2", "qwen3"])
def test_padding_of_a_family(name: str) -> None:
    """Windows, soft caps, learned positions, head norms."""
    decoder = decoder_of(PRESETS["w8a8"], name)
    assert answers(decoder, PARAMS, Padded()) == answers(decoder, PARAMS, None)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(12, temperature=0.9, seed=5, ignore_eos=True),
        SamplingParams(12, temperature=0.9, seed=5, ignore_eos=True, repetition_penalty=1.3, top_k=20),
        SamplingParams(12, ignore_eos=True, repetition_penalty=1.3),
    ],
    ids=["drawn", "penalized and drawn", "penalized"],
)
def test_padding_does_not_change_what_is_drawn(params: SamplingParams) -> None:
    decoder = decoder_of(PRESETS["w8a8"])
    assert answers(decoder, params, Padded()) == answers(decoder, params, None)


def test_log_probabilities_and_grammars_beside_plain_requests() -> None:
    """The likeliest tokens that a captured step keeps are replaced by the chosen ones, for these rows and the next."""
    decoder = decoder_of(PRESETS["w8a8"], "qwen2")
    asked = [
        SamplingParams(12, ignore_eos=True, logprobs=3, prompt_logprobs=2),
        SamplingParams(12, ignore_eos=True),
        SamplingParams(40, temperature=1.0, seed=1, grammar=RULES),
        SamplingParams(12, temperature=0.7, seed=2, ignore_eos=True),
    ]

    def run(wrap: Padded | None) -> list[tuple[Progress, list[Token]]]:
        engine = make_engine(decoder, wrap=wrap, eos_ids={EOS}, budget=24)

        async def all_of() -> list[tuple[Progress, list[Token]]]:
            runs = (finished(engine, prompt, asked[i % 4]) for i, prompt in enumerate(PROMPTS))
            return await asyncio.gather(*runs)

        try:
            return asyncio.run(all_of())
        finally:
            engine.stop()

    for (found, tokens), (wanted, expected) in zip(run(Padded()), run(None), strict=True):
        assert [token.id for token in tokens] == [token.id for token in expected]
        for token, other in zip(tokens, expected, strict=True):
            assert token.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-5))
        assert len(found.prompt_logprobs) == len(wanted.prompt_logprobs)
        for scored, score in zip(found.prompt_logprobs, wanted.prompt_logprobs, strict=True):
            assert scored.logprob == pytest.approx(score.logprob, abs=1e-5)


def test_padding_that_samples_for_somebody_is_found() -> None:
    decoder = decoder_of(PRESETS["w8a8"])
    assert answers(decoder, PARAMS, Padded("sample_rows")) != answers(decoder, PARAMS, None)


def test_padding_that_writes_where_keys_are_is_found() -> None:
    decoder = decoder_of(PRESETS["w8a8"])
    plain = told(decoder, None)
    assert distance(told(decoder, Padded()), plain) < 1e-4
    try:
        spoilt = distance(told(decoder, Padded("slots")), plain)
    except EngineFailed:
        return  # attention leaves the rows of padding as they were in memory, and NaN is found as well
    assert spoilt > 1e-2
