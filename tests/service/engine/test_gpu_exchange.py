"""An exchange of weights on a GPU: graphs are captured on the cache in use, between the steps of two busy engines."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from quant.scheme import PRESETS
from service.engine.api import SamplingParams
from service.engine.device.device_thread import DeviceThread
from service.engine.device.runner import Runner
from service.engine.loop import EngineLoop
from service.engine.scheduler import Scheduler
from service.models.config import ModelConfig
from service.models.random_weights import random_decoder
from tests.support.engines import PROMPTS, collect_all
from tests.support.tiny_models import make_model

pytestmark = pytest.mark.gpu
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)


def warm(runner: Runner, device_thread: DeviceThread) -> Runner:
    pieces = runner.warming()
    while device_thread.run(next, pieces, None) is not None:
        pass
    return runner


def start(name: str, runner: Runner, device_thread: DeviceThread) -> EngineLoop:
    return EngineLoop(
        name,
        Scheduler(num_blocks=200, block_size=16, max_num_requests=16, max_batched_tokens=64),
        runner,
        device_thread=device_thread,
        max_model_len=256,
    ).start()


def test_weights_are_exchanged_between_the_steps_of_two_engines() -> None:
    config, cuda, device_thread = ModelConfig.of(make_model("llama").config), torch.device("cuda"), DeviceThread()
    old, new = (random_decoder(config, PRESETS["w8a8"], torch.float16, cuda, seed) for seed in (1, 2))
    baseline = random_decoder(config, PRESETS["fp16"], torch.float16, cuda, 3)
    runner = warm(Runner(old, num_blocks=200, block_size=16, max_requests=16, max_tokens=64), device_thread)
    engine = start("w8a8", runner, device_thread)
    other = start(
        "fp16",
        warm(Runner(baseline, num_blocks=200, block_size=16, max_requests=16, max_tokens=64), device_thread),
        device_thread,
    )
    fresh = start(
        "fresh",
        warm(Runner(new, num_blocks=200, block_size=16, max_requests=16, max_tokens=64), device_thread),
        device_thread,
    )

    async def go() -> tuple[list[list[int]], list[list[int]], list[list[int]], list[list[int]], int]:
        before = await collect_all(engine, PROMPTS, PARAMS)
        expected = await collect_all(fresh, PROMPTS, PARAMS)
        is_over = threading.Event()
        answers: list[list[int]] = []

        async def load(target: EngineLoop, kept: list[list[int]]) -> None:
            while not is_over.is_set():
                kept += await collect_all(target, PROMPTS[:6], PARAMS)

        busy = [asyncio.ensure_future(load(engine, answers)), asyncio.ensure_future(load(other, []))]
        await asyncio.sleep(0)  # both have submitted
        num_steps = engine.stats().num_steps
        replacement = await asyncio.to_thread(
            lambda: warm(
                Runner(new, num_blocks=200, block_size=16, max_requests=16, max_tokens=64, caches=runner.caches),
                device_thread,
            )
        )
        num_meanwhile = engine.stats().num_steps - num_steps
        await asyncio.wrap_future(engine.exchange(replacement, 200, new.weight_bytes, 60.0))
        after = await collect_all(engine, PROMPTS, PARAMS)
        is_over.set()
        await asyncio.gather(*busy)
        return before, expected, after, answers, num_meanwhile

    try:
        before, expected, after, answers, num_meanwhile = asyncio.run(go())
    finally:
        for each in (engine, other, fresh):
            each.stop()
    assert before != expected == after
    assert num_meanwhile >= 3, "nothing ran while the graphs were captured"
    for place, tokens in enumerate(answers):
        assert tokens in (before[place % 6], expected[place % 6])
    assert all(each.failure is None and each.stats().num_restarts == 0 for each in (engine, other, fresh))
    assert all(each.stats().kv_cache_usage_ratio == 0 for each in (engine, other, fresh))
