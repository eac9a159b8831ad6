"""Answers held to a grammar: what may be drawn, when it is planned, and who is touched."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.scheme import PRESETS
from service.engine.api import FinishReason, Progress, SamplingParams, Token
from service.engine.device.sampler import Choice, Fault, sample
from service.engine.device.sampling import SamplingBuilder
from service.engine.device.staging import Staging
from service.engine.device.token_mask import TokenMask
from service.engine.loop import EngineLoop
from service.engine.request import Request
from service.engine.scheduler import Chunk
from service.errors import EngineFailed
from service.models.config import ModelConfig
from service.models.random_weights import random_decoder
from tests.service.kinds import StartEngine
from tests.support.engines import CPU, PROMPTS, make_engine
from tests.support.grammars import EOS, REGISTRY, RULES, SCHEMA, Only, finished, matcher_of, text_of
from tests.support.lateness import start_late
from tests.support.tiny_models import make_model


def choose(logits: Tensor, *params: SamplingParams, seen: Tensor | None = None) -> Choice:
    requests = [Request(str(i), [1], p, 0.0, i, matcher=matcher_of(p)) for i, p in enumerate(params)]
    chunks = [Chunk(r, 0, 1, True, 0) for r in requests]
    return sample(logits, SamplingBuilder(len(chunks), logits.shape[-1], CPU).build(chunks), seen)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"temperature": 0.5, "top_k": 4, "repetition_penalty": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_else_is_drawn(settings: dict[str, Any]) -> None:
    logits = torch.randn(60, 300, generator=torch.Generator().manual_seed(0)) * 4
    seen = torch.rand(60, 300, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed = [{7 * i % 300, (7 * i + 1) % 300, 299} for i in range(60)]
    params = [SamplingParams(grammar=REGISTRY.name(Only(a)), **settings) for a in allowed]
    choice = choose(logits, *params, seen=seen)
    assert all(token in a for token, a in zip(choice.ids.tolist(), allowed, strict=True))
    assert not choice.faults.any()


def test_the_likeliest_of_the_allowed_is_taken() -> None:
    logits = torch.tensor([[5.0, 4.0, -3.0, 1.0, -2.0]])
    assert choose(logits, SamplingParams(grammar=REGISTRY.name(Only({1, 3})))).ids.item() == 1
    # 4 / 8 < 1, and what is not allowed stays so whatever the penalty makes of it.
    seen = torch.tensor([[False, True, True, False, False]])
    params = SamplingParams(grammar=REGISTRY.name(Only({1, 3})), repetition_penalty=8.0)
    assert choose(logits, params, seen=seen).ids.item() == 3


def test_rows_without_a_grammar_keep_their_bits() -> None:
    logits = torch.randn(5, 77)
    logits[3, 5] = float("nan")
    chunks = [
        Chunk(Request(str(i), [1], SamplingParams(), 0.0, 0, matcher=Only({9}) if i in {1, 4} else None), 0, 1, True, 0)
        for i in range(5)
    ]
    constraint = TokenMask.build(chunks, Staging(CPU))
    assert constraint is not None
    masked = constraint.apply(logits)
    for row in (0, 2, 3):
        assert torch.equal(masked[row].view(torch.int32), logits[row].view(torch.int32))
    for row in (1, 4):
        assert masked[row].isfinite().nonzero().flatten().tolist() == [9]
        assert masked[row, 9] == logits[row, 9]
    assert TokenMask.build(chunks[2:4], Staging(CPU)) is None


def test_tokens_beyond_the_bits_are_not_allowed() -> None:
    chunk = Chunk(Request("a", [1], SamplingParams(), 0.0, 0, matcher=Only(set(range(320)))), 0, 1, True, 0)
    constraint = TokenMask.build([chunk], Staging(CPU))
    assert constraint is not None
    masked = constraint.apply(torch.zeros(1, 330))
    assert masked[0, :320].eq(0).all()
    assert masked[0, 320:].eq(float("-inf")).all()


def test_a_row_with_nothing_left_says_so_alone() -> None:
    logits = torch.zeros(4, 300)
    logits[1, 7], logits[3, 7] = float("-inf"), float("nan")
    params = [SamplingParams(temperature=1.0, grammar=REGISTRY.name(Only(a))) for a in ({7}, {7}, {310}, {8})]
    assert choose(logits, *params).faults.tolist() == [
        Fault.NONE,
        Fault.NONE_ALLOWED,
        Fault.NONE_ALLOWED,
        Fault.NOT_FINITE,
    ]


def engine_and_decoder(start: StartEngine, **limits: int) -> EngineLoop:
    decoder = random_decoder(ModelConfig.of(make_model("qwen2").config), PRESETS["w8a8"], torch.float32, CPU)
    return start(decoder, eos_ids=[EOS], **limits)


PREEMPTING = {"block_size": 4, "num_blocks": 70, "budget": 24}


@pytest.mark.parametrize("start", [make_engine, start_late])
@pytest.mark.parametrize("limits", [{}, PREEMPTING], ids=["roomy", "preempting"])
def test_answers_parse_and_validate_and_neighbours_stay_as_they_are(start: StartEngine, limits: dict[str, int]) -> None:
    """Two runs that differ in half the requests: the other half, random too, gets the same tokens.

    Not where requests are preempted, since others are then, and what is computed again rounds differently.
    """
    jsonschema = pytest.importorskip("jsonschema")
    engine = engine_and_decoder(start, **limits)
    free = [SamplingParams(40, temperature=1.0, seed=i, logprobs=1) for i in range(len(PROMPTS))]
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {},
        {"temperature": 1.0, "repetition_penalty": 1.3, "top_p": 0.9},
    ]
    grammar = RULES
    held = [
        replace(free[i], max_tokens=140, grammar=grammar, ignore_eos=i % 2 == 0, **settings[i % 3]) for i in range(12)
    ]

    async def run(params: list[SamplingParams]) -> list[tuple[Progress, list[Token]]]:
        return await asyncio.gather(*(finished(engine, PROMPTS[i], params[i], str(i)) for i in range(len(PROMPTS))))

    try:
        alone = asyncio.run(run(free))
        mixed = asyncio.run(run([held[i] if i % 2 else free[i] for i in range(12)]))
        again = asyncio.run(run([held[i] if i % 2 == 0 else free[i] for i in range(12)]))
    finally:
        engine.stop()
    num_stopped = 0
    for i in range(12):
        (request, tokens), (_, same) = (mixed[i], again[i]) if i % 2 else (again[i], mixed[i])
        if not limits:
            assert [token.id for token in same] == [token.id for token in alone[i][1]]
        if request.finish_reason == FinishReason.STOP:
            num_stopped += 1
            assert tokens[-1].id == EOS
            jsonschema.validate(json.loads(text_of(tokens)), SCHEMA)
        else:
            assert request.finish_reason == FinishReason.LENGTH
            assert len(tokens) == 140
    assert num_stopped >= 9, "a schema without an open string ends soon"
    assert (engine.stats().num_preemptions > 0) == bool(limits)
    assert engine.stats().kv_cache_usage_ratio == 0


def test_max_tokens_inside_the_json() -> None:
    engine = engine_and_decoder(make_engine)
    try:
        request, tokens = asyncio.run(finished(engine, PROMPTS[2], SamplingParams(9, temperature=1.0, grammar=RULES)))
    finally:
        engine.stop()
    assert request.finish_reason == FinishReason.LENGTH
    assert len(tokens) == 9
    assert text_of(tokens).startswith("{")


def test_a_seed_gives_the_same_answer_under_preemption_and_lateness() -> None:
    params = SamplingParams(60, temperature=1.0, seed=5, grammar=RULES)
    runs = []
    for start, limits in ((make_engine, {}), (start_late, PREEMPTING)):
        engine = engine_and_decoder(start, **limits)

        async def run(engine: EngineLoop = engine) -> list[tuple[Progress, list[Token]]]:
            return await asyncio.gather(*(finished(engine, prompt, params) for prompt in PROMPTS))

        try:
            runs.append([[token.id for token in tokens] for _, tokens in asyncio.run(run())])
        finally:
            engine.stop()
        assert (engine.stats().num_preemptions > 0) == bool(limits)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("start", [make_engine, start_late])
def test_a_grammar_that_allows_nothing_fails_its_request_alone(start: StartEngine) -> None:
    engine = engine_and_decoder(start)
    stuck = SamplingParams(20, grammar=REGISTRY.name(Only({65}, {66}, {300})))

    async def run() -> tuple[list[int], Progress, list[list[Token]]]:
        neighbours = [asyncio.ensure_future(finished(engine, p, SamplingParams(20), str(p[0]))) for p in PROMPTS[:5]]
        stream, said = engine.submit(PROMPTS[6], stuck, "stuck"), []
        with pytest.raises(EngineFailed, match="cannot go on after 2 tokens"):  # noqa: PT012 (what came before the error counts)
            async for tokens in stream:
                said += [token.id for token in tokens]
        return said, stream.progress, [tokens for _, tokens in await asyncio.gather(*neighbours)]

    try:
        said, progress, neighbours = asyncio.run(run())
    finally:
        engine.stop()
    assert said == [65, 66]
    assert progress.finish_reason == FinishReason.ABORT
    assert all(len(tokens) == 20 or tokens[-1].id == EOS for tokens in neighbours)
    assert engine.stats().kv_cache_usage_ratio == 0
    assert engine.failure is None
