"""The engine on a GPU: captured steps, lookahead, and the same tokens as the reference ops on the CPU."""

from __future__ import annotations

import asyncio

import pytest
import torch

from benchmarks.chain import Moved
from quant.scheme import PRESETS
from service.engine.loop import EngineLoop
from service.engine.request import SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from service.engine.turnstile import Turnstile
from service.models.decoder import Decoder, score
from service.models.families import ModelConfig, linear_names
from service.models.loader import RandomWeights, load_decoder, random_decoder
from tests.engine.test_loop import PROMPTS, collect_all
from tests.models.conftest import TINY, make_model, tiny  # noqa: F401 (a fixture)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)


def generate(decoder: Decoder, use_graphs: bool, num_blocks: int = 200, one_by_one: bool = False) -> list[list[int]]:
    runner = Runner(decoder, num_blocks, 16, 16, 64, use_graphs)
    runner.warm_up()
    engine = EngineLoop("w8a8", Scheduler(num_blocks, 16, 16, 64), runner, Turnstile(), 256).start()

    async def run():
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
def test_logits_equal_the_reference_ops(scheme):
    """The same random weights through the Triton kernels and through plain torch on the CPU."""
    config = ModelConfig.of(make_model("llama").config)
    ids, cpu = torch.arange(3, 150), torch.device("cpu")
    with torch.inference_mode():
        here, there = (Moved(RandomWeights(scheme, linear_names(config), torch.float32, cpu), x) for x in (cpu, CUDA))
        expected = score(Decoder(config, here, scheme.kv), ids)
        found = score(Decoder(config, there, scheme.kv), ids).cpu()
    assert ((found - expected).norm() / expected.norm()).item() < (2e-2 if scheme.is_int8 else 1e-4)


@pytest.mark.parametrize("name", TINY)
def test_fp16_logits_equal_transformers(tiny, name):  # noqa: F811
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
def test_captured_steps_give_the_tokens_of_plain_ones(scheme):
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), scheme, torch.float16, CUDA)
    assert generate(decoder, use_graphs=True) == generate(decoder, use_graphs=False)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "opt", "gpt2", "gpt_neox", "qwen3", "qwen3_moe"])
def test_steps_of_a_family(name):
    """Captured and plain steps give the same tokens; experts are never captured."""
    decoder = random_decoder(ModelConfig.of(make_model(name).config), PRESETS["w8a8"], torch.float16, CUDA)
    assert Runner(decoder, 20, 16, 4, 64).use_graphs == (name != "qwen3_moe")
    assert generate(decoder, use_graphs=True) == generate(decoder, use_graphs=False)


@pytest.mark.parametrize("scheme", [PRESETS["w8a8"], INT8_KV], ids=lambda scheme: scheme.label)
def test_int8_tokens_do_not_depend_on_the_batch(scheme):
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), scheme, torch.float32, CUDA)
    assert generate(decoder, use_graphs=True) == generate(decoder, use_graphs=True, one_by_one=True)


def test_preemption_with_a_step_in_flight_loses_nothing():
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), PRESETS["w8a8"], torch.float32, CUDA)
    assert generate(decoder, use_graphs=True, num_blocks=18) == generate(decoder, use_graphs=True)
