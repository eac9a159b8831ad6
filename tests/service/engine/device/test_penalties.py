"""Penalties, biases and held ends against a reference in float64, on each device; neutral values change no bit."""

from __future__ import annotations

import asyncio
import math
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.scheme import PRESETS
from service.engine.api import SamplingParams
from service.engine.device.runner import Forward, Runner
from service.engine.device.sampler import Choice, sample
from service.engine.device.sampling import SamplingBuilder
from service.engine.device.token_counts import TokenCounts
from service.engine.request import Request
from service.engine.scheduler import Chunk, Step
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.random_weights import random_decoder
from tests.support.engines import CPU, PROMPTS, collect_all, make_engine
from tests.support.lateness import LateRunner
from tests.support.tiny_models import make_model

NUM_TOKENS = 1000
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def chunk_of(params: SamplingParams, row: int, output_ids: list[int], prompt_ids: list[int]) -> Chunk:
    request = Request(str(row), prompt_ids, params, 0.0, row, output_ids=output_ids, row=row)
    return Chunk(request, 0, request.num_tokens, True, len(output_ids))


def reference(logits: Tensor, chunk: Chunk) -> Tensor:
    """What the token is chosen from, in float64: [V]."""
    request, found = chunk.request, logits.double().clone()
    p = request.params
    for token in {*request.prompt_ids, *request.output_ids}:
        found[token] *= p.repetition_penalty if found[token] <= 0 else 1 / p.repetition_penalty
    for token in set(request.output_ids):
        found[token] -= p.presence_penalty + p.frequency_penalty * request.output_ids.count(token)
    for token, bias in p.logit_bias:
        found[token] += bias
    if len(request.output_ids) < p.min_tokens:
        found[list(p.held_ids)] = -math.inf
    return found


def random_chunks(seed: int, num_rows: int) -> list[Chunk]:
    generator = torch.Generator().manual_seed(seed)

    def ints(count: int, most: int = NUM_TOKENS) -> list[int]:
        return torch.randint(0, most, (count,), generator=generator).tolist()

    def real() -> float:
        return float(torch.rand((), generator=generator)) * 4 - 2

    chunks = []
    for row in range(num_rows):
        params = SamplingParams(
            repetition_penalty=1.0 if row % 3 else 1.3,
            presence_penalty=0.0 if row % 4 == 1 else real(),
            frequency_penalty=0.0 if row % 4 == 2 else real(),
            logit_bias=() if row % 5 == 3 else tuple((token, 40 * real()) for token in {*ints(6), row}),
            held_ids=tuple({*ints(3), row}),
            min_tokens=row % 7 * 4,
        )
        chunks.append(chunk_of(params, row, ints(row * 2, 40), ints(9)))
    return chunks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_that_of_the_reference(device: torch.device, seed: int) -> None:
    chunks = random_chunks(seed, 17)
    logits = torch.randn(17, NUM_TOKENS, generator=torch.Generator().manual_seed(seed)) * 3
    seen = torch.zeros(17, NUM_TOKENS, dtype=torch.bool)
    for row, chunk in enumerate(chunks):
        seen[row, chunk.request.prompt_ids + chunk.request.output_ids] = True
    rows = torch.arange(17, device=device)
    counts = TokenCounts(17, NUM_TOKENS, device).of(chunks, rows)
    found_seen = TokenCounts(17, NUM_TOKENS, device, is_seen=True).of(chunks, rows)
    for row, chunk in enumerate(chunks):
        p, output = chunk.request.params, torch.tensor(chunk.request.output_ids, dtype=torch.int64)
        if p.presence_penalty or p.frequency_penalty:
            assert counts[row].tolist() == torch.bincount(output, minlength=NUM_TOKENS).tolist()
        if p.repetition_penalty != 1:
            assert found_seen[row].tolist() == seen[row].tolist()
    batch = SamplingBuilder(17, NUM_TOKENS, device).build(chunks)
    ids = sample(logits.to(device), batch, seen.to(device), counts).ids.tolist()
    for row, chunk in enumerate(chunks):
        wanted = reference(logits[row], chunk)
        # Equal but for two tokens that are the same distance from a rounding in float32.
        assert wanted[ids[row]] >= wanted.max() - 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_neutral_values_change_no_bit(device: torch.device) -> None:
    """Beside rows that are changed, and with values that only look like something."""
    logits = torch.randn(3, NUM_TOKENS, device=device)
    logits[1, :3] = torch.tensor([-0.0, 0.0, -math.inf])
    plain = SamplingParams(temperature=1.0, top_p=0.9)
    idle = SamplingParams(temperature=1.0, top_p=0.9, held_ids=(5, 6), logit_bias=())
    changed = SamplingParams(temperature=1.0, presence_penalty=1.0, frequency_penalty=1.0, logit_bias=((4, 3.0),))

    def chosen(*params: SamplingParams) -> list[list[int]]:
        chunks = [chunk_of(p, row, [1, 2, 2], [3]) for row, p in enumerate(params)]
        counts = TokenCounts(3, NUM_TOKENS, device).of(chunks, torch.arange(3, device=device))
        return [
            sample(logits * scale, SamplingBuilder(3, NUM_TOKENS, device).build(chunks), None, counts).ids.tolist()
            for scale in (0.1, 1.0, 5.0)
        ]

    alone, beside = chosen(plain, plain, plain), chosen(changed, idle, changed)
    assert [ids[1] for ids in alone] == [ids[1] for ids in beside]


def test_biased_rows_leave_the_bits_of_others() -> None:
    logits = torch.randn(4, 50)
    logits[2, :3] = torch.tensor([-0.0, 1e-40, -math.inf])
    chunks = [chunk_of(SamplingParams(logit_bias=((7, 2.5),) if row == 1 else ()), row, [], [1]) for row in range(4)]
    bias = SamplingBuilder(4, 50, torch.device("cpu")).build(chunks).bias
    assert bias is not None
    found = bias.apply(logits)
    expected = logits.clone()
    expected[1, 7] += 2.5
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    device = torch.device("cuda")
    chunks = random_chunks(0, 9)
    logits, rows = torch.randn(9, NUM_TOKENS, device=device), torch.arange(9, device=device)
    counts, builder = TokenCounts(9, NUM_TOKENS, device), SamplingBuilder(9, NUM_TOKENS, device)
    seen = TokenCounts(9, NUM_TOKENS, device, is_seen=True)

    def step() -> None:
        choice = sample(logits, builder.build(chunks), seen.of(chunks, rows), counts.of(chunks, rows))
        counts.add(rows, choice.ids)
        seen.add(rows, choice.ids)

    step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode does not find everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        counts._owners = seen._owners = [(0, 0)] * 9
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def answers(params: SamplingParams, *, is_preempted: bool = False, **options: Any) -> list[list[int]]:
    async def go() -> list[list[int]]:
        engine = make_engine(decoder(), eos_ids={EOS}, **options)
        try:
            found = await collect_all(engine, PROMPTS[:6], params)
            assert (engine.stats().num_preemptions > 0) == is_preempted
            return found
        finally:
            engine.stop()

    return asyncio.run(go())


@cache
def decoder() -> Decoder:
    return random_decoder(ModelConfig.of(make_model("llama").config), PRESETS["w8a8"], torch.float32, CPU)


EOS = 2
PENALIZED = SamplingParams(24, presence_penalty=1.5, frequency_penalty=1.0, ignore_eos=True)


def test_a_penalized_answer_is_the_same_however_its_steps_are_run() -> None:
    """Its counts survive a preemption, and a step whose tokens the host has not read yet."""
    plain, penalized = answers(replace(PENALIZED, presence_penalty=0.0, frequency_penalty=0.0)), answers(PENALIZED)
    assert sum(len(set(ids)) for ids in penalized) > sum(len(set(ids)) for ids in plain)
    assert answers(PENALIZED, wrap=LateRunner) == penalized
    assert answers(PENALIZED, wrap=LateRunner, num_blocks=16, block_size=8, is_preempted=True) == penalized


def test_ends_are_held_back_and_then_end_the_answer() -> None:
    free = answers(SamplingParams(24, ignore_eos=True))
    ends = tuple({ids[3] for ids in free})
    stopped = answers(SamplingParams(24, ignore_eos=True, end_ids=ends))
    assert stopped == [ids[: 1 + next((n for n, id_ in enumerate(ids) if id_ in ends), 24)] for ids in free]
    assert any(len(ids) < 24 for ids in stopped)
    for wrap in (None, LateRunner):
        held = answers(SamplingParams(24, ignore_eos=True, end_ids=ends, held_ids=ends, min_tokens=9), wrap=wrap)
        assert all(len(ids) > 9 and not {*ends} & {*ids[:9]} for ids in held)
    biased = answers(SamplingParams(5, ignore_eos=True, logit_bias=((77, 100.0),)), wrap=LateRunner)
    assert biased == [[77] * 5] * 6


def test_repetition_is_penalized_the_same_however_steps_are_run() -> None:
    """What has been seen survives a preemption, and a step whose tokens the host has not read yet."""
    penalized = SamplingParams(24, repetition_penalty=1.8, ignore_eos=True)
    wanted = answers(penalized)
    assert wanted != answers(SamplingParams(24, ignore_eos=True))
    assert answers(penalized, wrap=LateRunner) == wanted
    assert answers(penalized, wrap=LateRunner, num_blocks=16, block_size=8, is_preempted=True) == wanted


def test_what_was_added_to_a_prompt_is_not_penalized() -> None:
    """Tokens of the model's sink, which the submitter did not send."""
    params = SamplingParams(repetition_penalty=1.5)
    requests = [
        Request(str(row), [5, 6, 7], params, 0.0, 0, row=row, num_added=num_added)
        for row, num_added in enumerate((0, 1, 2))
    ]
    seen = TokenCounts(3, 256, torch.device("cpu"), is_seen=True)
    found = seen.of([Chunk(request, 0, 3, True, 0) for request in requests], torch.arange(3))
    assert [row.nonzero().flatten().tolist() for row in found] == [[5, 6, 7], [6, 7], [7]]


def test_after_a_penalized_request_the_tokens_of_graphs_are_taken_again() -> None:
    runner = Runner(decoder(), num_blocks=4, block_size=16, max_requests=4, max_tokens=16)
    for params in (SamplingParams(repetition_penalty=1.5), PENALIZED):
        request = Request("p", [5, 6, 7], params, 0.0, 0, row=1, blocks=[0])
        runner.execute(Step([Chunk(request, 0, 3, True, 0)]))
    request = Request("g", [5, 6, 7], SamplingParams(), 0.0, 0, row=2, blocks=[1])
    batch = runner._batches.view(num_tokens=3, num_requests=1, num_samples=1, is_decode=False)
    likeliest = Choice(torch.tensor([3]), torch.tensor([0]))
    with torch.inference_mode():
        forward = Forward(torch.zeros(3, 192), torch.zeros(1, 256), likeliest)
        assert runner._choose(forward, batch, [Chunk(request, 0, 3, True, 0)]).ids.tolist() == [3]
