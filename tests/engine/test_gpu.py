"""The engine on a GPU: captured steps, lookahead, and the same tokens as the reference ops on the CPU."""

from __future__ import annotations

import asyncio

import pytest
import torch

from quant.scheme import PRESETS
from service.engine.loop import EngineLoop
from service.engine.request import SamplingParams
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from service.engine.turnstile import Turnstile
from service.models.decoder import Decoder, score
from service.models.families import ModelConfig
from service.models.loader import load_decoder, random_decoder
from tests.engine.test_loop import PROMPTS, collect_all
from tests.models.conftest import make_model, tiny  # noqa: F401 (a fixture)

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
    decoder = random_decoder(config, scheme, torch.float32, torch.device("cpu"))
    ids = torch.arange(3, 150)
    with torch.inference_mode():
        expected = score(decoder, ids)
        found = score(to_gpu(decoder), ids).cpu()
    assert ((found - expected).norm() / expected.norm()).item() < (2e-2 if scheme.is_int8 else 1e-4)


def to_gpu(decoder: Decoder) -> Decoder:
    decoder.embedding, decoder.cos_sin = decoder.embedding.cuda(), decoder.cos_sin.cuda()
    decoder.norm.weight, decoder.head = decoder.norm.weight.cuda(), decoder.head.to("cuda")
    for layer in decoder.layers:
        for name in ("qkv", "o", "gated", "down"):
            setattr(layer, name, getattr(layer, name).to("cuda"))
        for norm, linear in ((layer.attention_norm, layer.qkv), (layer.mlp_norm, layer.gated)):
            norm.weight, norm.quantize = norm.weight.cuda(), linear.input_format
    return decoder


@pytest.mark.parametrize("name", ["llama", "llama-wide-heads", "qwen2"])
def test_fp16_logits_equal_transformers(tiny, name):  # noqa: F811
    model, folder = tiny(name)
    ids = torch.arange(3, 203)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
        found = score(load_decoder(folder, torch.float32, CUDA), ids).cpu()
    assert ((found - expected).norm() / expected.norm()).item() < 1e-3


@pytest.mark.parametrize(
    "scheme",
    [PRESETS["fp16"], PRESETS["w8a8"], PRESETS["smoothquant-o3"], INT8_KV],
    ids=lambda scheme: scheme.label,
)
def test_captured_steps_give_the_tokens_of_plain_ones(scheme):
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), scheme, torch.float16, CUDA)
    assert generate(decoder, use_graphs=True) == generate(decoder, use_graphs=False)


@pytest.mark.parametrize("scheme", [PRESETS["w8a8"], INT8_KV], ids=lambda scheme: scheme.label)
def test_int8_tokens_do_not_depend_on_the_batch(scheme):
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), scheme, torch.float32, CUDA)
    assert generate(decoder, use_graphs=True) == generate(decoder, use_graphs=True, one_by_one=True)


def test_preemption_with_a_step_in_flight_loses_nothing():
    decoder = random_decoder(ModelConfig.of(make_model("llama").config), PRESETS["w8a8"], torch.float32, CUDA)
    assert generate(decoder, use_graphs=True, num_blocks=18) == generate(decoder, use_graphs=True)
