"""The engine on a GPU: captured steps, lookahead, and the same tokens as the reference ops on the CPU."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch

from benchmarks.chain import Moved
from quant.scheme import PRESETS, Scheme
from service.engine.api import EngineStats, FinishReason, Progress, SamplingParams, Token
from service.engine.device.device_thread import DeviceThread
from service.engine.device.runner import Runner
from service.engine.drafts.speculation import Speculation
from service.engine.loop import EngineLoop
from service.engine.scheduler import Scheduler
from service.models.config import ModelConfig
from service.models.decoder import Decoder, score
from service.models.loader import load_decoder
from service.models.random_weights import RandomWeights, random_decoder
from tests.service.kinds import Tiny
from tests.support.eager import Eager
from tests.support.engines import PROMPTS, collect_all, make_engine
from tests.support.grammars import EOS, REGISTRY, RULES, SCHEMA, finished, text_of
from tests.support.tiny_models import TINY, make_model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)


def generate(decoder: Decoder, use_graphs: bool, num_blocks: int = 200, one_by_one: bool = False) -> list[list[int]]:
    runner = Runner(
        decoder, num_blocks=num_blocks, block_size=16, max_requests=16, max_tokens=64, use_graphs=use_graphs
    )
    runner.warm_up()
    engine = EngineLoop(
        "w8a8",
        Scheduler(num_blocks=num_blocks, block_size=16, max_num_requests=16, max_batched_tokens=64),
        runner,
        device_thread=DeviceThread(),
        max_model_len=256,
    ).start()

    async def run() -> list[list[int]]:
        if one_by_one:
            return [(await collect_all(engine, [prompt], PARAMS))[0] for prompt in PROMPTS]
        return await collect_all(engine, PROMPTS, PARAMS)

    try:
        tokens = asyncio.run(run())
        assert engine.stats().kv_cache_usage_ratio == 0
        return tokens
    finally:
        engine.stop()


INT8_KV = PRESETS["w8a8"].with_kv("int8")
SCHEMES = [*PRESETS.values(), INT8_KV]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_logits_equal_the_reference_ops(scheme: Scheme) -> None:
    """The same random weights through the Triton kernels and through plain torch on the CPU."""
    config = ModelConfig.of(make_model("llama").config)
    ids, cpu = torch.arange(3, 150), torch.device("cpu")
    with torch.inference_mode():
        here, there = (Moved(RandomWeights(scheme, config, torch.float32, cpu), x) for x in (cpu, CUDA))
        expected = score(Decoder(config, here, scheme.kv), ids)
        found = score(Decoder(config, there, scheme.kv), ids).cpu()
    assert ((found - expected).norm() / expected.norm()).item() < (2e-2 if scheme.is_int8 else 1e-4)


@pytest.mark.parametrize("name", TINY)
def test_fp16_logits_equal_transformers(tiny: Tiny, name: str) -> None:
    model, folder = tiny(name)
    decoder = load_decoder(folder, torch.float32, CUDA)
    ids = torch.arange(3, 203)[: decoder.config.max_model_len]
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
        found = score(decoder, ids).cpu()
    assert ((found - expected).norm() / expected.norm()).item() < 1e-3


@pytest.mark.parametrize(
    "scheme",
    [PRESETS["fp16"], PRESETS["w8a8"], PRESETS["smoothquant-o3"], INT8_KV],
    ids=lambda scheme: scheme.label,
)
def test_captured_steps_give_the_tokens_of_plain_ones(scheme: Scheme) -> None:
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), scheme, torch.float16, CUDA)
    assert generate(decoder, use_graphs=True) == generate(decoder, use_graphs=False)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "opt", "gpt2", "gpt_neox", "qwen3", "qwen3_moe"])
def test_steps_of_a_family(name: str) -> None:
    """Captured and plain steps give the same tokens; experts are never captured."""
    decoder = random_decoder(ModelConfig.of(make_model(name).config), PRESETS["w8a8"], torch.float16, CUDA)
    assert Runner(decoder, num_blocks=20, block_size=16, max_requests=4, max_tokens=64).use_graphs == (
        name != "qwen3_moe"
    )
    assert generate(decoder, use_graphs=True) == generate(decoder, use_graphs=False)


@pytest.mark.parametrize("scheme", [PRESETS["w8a8"], INT8_KV], ids=lambda scheme: scheme.label)
def test_int8_tokens_do_not_depend_on_the_batch(scheme: Scheme) -> None:
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), scheme, torch.float32, CUDA)
    assert generate(decoder, use_graphs=True) == generate(decoder, use_graphs=True, one_by_one=True)


@pytest.mark.parametrize("use_graphs", [True, False])
def test_answers_held_to_a_grammar(use_graphs: bool) -> None:
    """Beside captured steps that know of no grammar; the neighbours' tokens stay as they are."""
    jsonschema = pytest.importorskip("jsonschema")
    decoder = random_decoder(ModelConfig.of(make_model("qwen2").config), PRESETS["w8a8"], torch.float16, CUDA)
    runner = Runner(decoder, num_blocks=200, block_size=16, max_requests=16, max_tokens=64, use_graphs=use_graphs)
    runner.warm_up()
    engine = EngineLoop(
        "w8a8",
        Scheduler(num_blocks=200, block_size=16, max_num_requests=16, max_batched_tokens=64, eos_ids=frozenset({EOS})),
        runner,
        device_thread=DeviceThread(),
        max_model_len=256,
        grammars=REGISTRY,
    ).start()
    held = SamplingParams(140, temperature=1.0, seed=1, grammar=RULES)

    async def run() -> tuple[list[list[int]], list[list[int]], list[tuple[Progress, list[Token]]]]:
        alone = await collect_all(engine, PROMPTS[:6], PARAMS)
        free = asyncio.ensure_future(collect_all(engine, PROMPTS[:6], PARAMS))
        answers = await asyncio.gather(*(finished(engine, prompt, held) for prompt in PROMPTS[6:]))
        return alone, await free, answers

    try:
        alone, beside, answers = asyncio.run(run())
    finally:
        engine.stop()
    assert beside == alone
    for request, tokens in answers:
        if request.finish_reason == FinishReason.STOP:
            jsonschema.validate(json.loads(text_of(tokens)), SCHEMA)
    assert sum(request.finish_reason == FinishReason.STOP for request, _ in answers) >= 4


def test_log_probabilities_of_prompts() -> None:
    """Against those of the whole prompt in one chunk; rows that a step shares round as the tiles of its size do."""
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), PRESETS["w8a8"], torch.float32, CUDA)
    runner = Runner(decoder, num_blocks=200, block_size=16, max_requests=16, max_tokens=64)
    runner.warm_up()
    engine = EngineLoop(
        "w8a8",
        Scheduler(num_blocks=200, block_size=16, max_num_requests=16, max_batched_tokens=64),
        runner,
        device_thread=DeviceThread(),
        max_model_len=256,
    ).start()
    params = SamplingParams(8, ignore_eos=True, prompt_logprobs=3)

    async def run() -> list[tuple[Progress, list[Token]]]:
        return await asyncio.gather(*(finished(engine, prompt, params) for prompt in PROMPTS))

    try:
        requests = [request for request, _ in asyncio.run(run())]
    finally:
        engine.stop()
    for prompt, request in zip(PROMPTS, requests, strict=True):
        ids = torch.tensor(prompt)
        with torch.inference_mode():
            expected = score(decoder, ids).log_softmax(-1)[:-1].gather(-1, ids[1:, None].cuda())[:, 0]
        found = torch.tensor([token.logprob for token in request.prompt_logprobs])
        assert (found - expected.cpu()).abs().max() < 1e-2
        assert all(len(token.top_logprobs) == 3 for token in request.prompt_logprobs)


def test_a_closed_runner_computes_the_same_without_its_graphs() -> None:
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), PRESETS["w8a8"], torch.float16, CUDA)
    runner = Runner(decoder, num_blocks=200, block_size=16, max_requests=16, max_tokens=64)
    runner.warm_up()
    answers, freed_bytes = [], []
    for _ in range(2):
        engine = EngineLoop(
            "w8a8",
            Scheduler(num_blocks=200, block_size=16, max_num_requests=16, max_batched_tokens=64),
            runner,
            device_thread=DeviceThread(),
            max_model_len=256,
        ).start()
        try:
            answers.append(asyncio.run(collect_all(engine, PROMPTS, PARAMS)))
        finally:
            engine.stop()
        allocated_bytes = torch.cuda.memory_allocated()
        runner.close()
        freed_bytes.append(allocated_bytes - torch.cuda.memory_allocated())
    assert answers[0] == answers[1]
    assert freed_bytes[0] > freed_bytes[1] == 0, "what captured steps yield, once"


@pytest.mark.parametrize("scheme", [PRESETS["w8a8"], INT8_KV], ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("use_graphs", [True, False])
def test_drafts_change_no_token(scheme: Scheme, use_graphs: bool) -> None:
    """With an int8 head, whose rows do not depend on how many there are; captured steps take drafts as decodes."""
    config = ModelConfig.of(make_model("llama").config)
    decoder = random_decoder(config, scheme.with_head("int8"), torch.float16, CUDA)
    prompts = [[3 + (i * j) % 250 for j in range(1, 4 + i)] * 3 for i in range(8)]

    def run(speculation: Speculation | None) -> tuple[list[list[int]], EngineStats]:
        def warm(runner: Runner) -> Runner:
            runner.use_graphs = use_graphs
            runner.warm_up()
            return runner

        engine = make_engine(decoder, wrap=warm, speculation=speculation)
        try:
            return asyncio.run(collect_all(engine, prompts, PARAMS)), engine.stats()
        finally:
            engine.stop()

    wanted, _ = run(None)
    found, stats = run(Eager(3, 16))
    assert found == wanted
    assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens
    assert (stats.num_graph_steps > 0) == use_graphs


def test_preemption_with_a_step_in_flight_loses_nothing() -> None:
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), PRESETS["w8a8"], torch.float32, CUDA)
    assert generate(decoder, use_graphs=True, num_blocks=18) == generate(decoder, use_graphs=True)
