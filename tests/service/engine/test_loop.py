"""The engine whole: scheduler, runner and loop over a tiny random model, against Hugging Face's own generation."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.scheme import PRESETS, KVStorage
from service.engine.api import FinishReason, SamplingParams, Token
from service.engine.device.device_thread import DEVICE_THREAD, DeviceThread
from service.engine.loop import EngineLoop
from service.engine.messages import Submit
from service.engine.scheduler import Scheduler
from service.errors import QueueFull
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.loader import load_decoder
from service.models.random_weights import random_decoder
from tests.service.kinds import StartEngine, Tiny
from tests.support.engines import CPU, PROMPTS, collect, collect_all, make_engine
from tests.support.scripted_runner import ScriptedRunner
from tests.support.tiny_models import make_model


def greedy_by_transformers(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    return generated(model, prompt, max_new_tokens=count)


def generated(model: PreTrainedModel, prompt: list[int], **options: Any) -> list[int]:
    generate = cast(Callable[..., Tensor], model.generate)  # its type does not say that it has it
    ids: list[int] = generate(torch.tensor([prompt]), do_sample=False, eos_token_id=None, **options)[
        0, len(prompt) :
    ].tolist()
    return ids


@pytest.fixture
def engine_of() -> Iterator[StartEngine]:
    engines: list[EngineLoop] = []

    def start(decoder: Decoder, **kwargs: Any) -> EngineLoop:
        engines.append(make_engine(decoder, **kwargs))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"budget": 16, "block_size": 4, "num_blocks": 500},  # prompts in chunks
        {"block_size": 4, "num_blocks": 70},  # preemption
    ],
)
def test_greedy_tokens_equal_transformers_alone_and_together(
    tiny: Tiny, engine_of: StartEngine, name: str, limits: dict[str, object]
) -> None:
    model, folder = tiny(name)
    engine = engine_of(load_decoder(folder, torch.float32, CPU), **limits)
    expected = [greedy_by_transformers(model, prompt, 16) for prompt in PROMPTS]
    params = SamplingParams(max_tokens=16, ignore_eos=True)

    async def alone_then_together() -> tuple[list[list[int]], list[list[int]]]:
        alone = [(await collect_all(engine, [prompt], params))[0] for prompt in PROMPTS]
        return alone, await collect_all(engine, PROMPTS, params)

    alone, together = asyncio.run(alone_then_together())
    assert alone == expected
    assert together == expected
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert (stats.num_preemptions > 0) == ("num_blocks" in limits and limits["num_blocks"] == 70)


@pytest.mark.parametrize("kv", ["float", "int8"])
@pytest.mark.parametrize("scheme", ["w8a8", "smoothquant-o3"])
def test_int8_tokens_do_not_depend_on_the_batch(engine_of: StartEngine, scheme: str, kv: KVStorage) -> None:
    """Integer sums are exact, so int8 rows are independent down to the last bit."""
    config = ModelConfig.of(make_model("llama").config)
    engine = engine_of(random_decoder(config, PRESETS[scheme].with_kv(kv), torch.float32, CPU))
    params = SamplingParams(max_tokens=24, ignore_eos=True)

    async def both() -> tuple[list[list[int]], list[list[int]]]:
        alone = [(await collect_all(engine, [prompt], params))[0] for prompt in PROMPTS]
        return alone, await collect_all(engine, PROMPTS, params)

    alone, together = asyncio.run(both())
    assert alone == together


def test_a_seed_gives_the_same_tokens_under_preemption(tiny: Tiny, engine_of: StartEngine) -> None:
    _, folder = tiny("llama")
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=11, ignore_eos=True)
    runs = []
    for limits in ({}, {"block_size": 4, "num_blocks": 70, "budget": 24}):
        engine = engine_of(load_decoder(folder, torch.float32, CPU), **limits)
        runs.append(asyncio.run(collect_all(engine, PROMPTS, params)))
        assert (engine.stats().num_preemptions > 0) == bool(limits)
    assert runs[0] == runs[1]


def test_repetition_penalty_equals_transformers(tiny: Tiny, engine_of: StartEngine) -> None:
    model, folder = tiny("llama")
    engine = engine_of(load_decoder(folder, torch.float32, CPU))
    prompt = PROMPTS[5]
    expected = generated(model, prompt, max_new_tokens=20, repetition_penalty=1.5)
    params = SamplingParams(max_tokens=20, repetition_penalty=1.5, ignore_eos=True)
    assert asyncio.run(collect_all(engine, [prompt], params)) == [expected]


def test_logprobs_belong_to_the_tokens(tiny: Tiny, engine_of: StartEngine) -> None:
    model, folder = tiny("llama")
    engine = engine_of(load_decoder(folder, torch.float32, CPU))
    prompt = PROMPTS[4]
    tokens = asyncio.run(collect(engine, prompt, SamplingParams(max_tokens=6, logprobs=3, ignore_eos=True)))
    ids = torch.tensor([prompt + [token.id for token in tokens]])
    with torch.inference_mode():
        expected = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    for row, token in zip(expected, tokens, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        assert [i for i, _ in token.top_logprobs] == row.topk(3).indices.tolist()


def test_eos_ends_a_request(tiny: Tiny, engine_of: StartEngine) -> None:
    model, folder = tiny("llama")
    expected = greedy_by_transformers(model, PROMPTS[3], 16)
    engine = engine_of(load_decoder(folder, torch.float32, CPU), eos_ids=[expected[5]])
    tokens = asyncio.run(collect(engine, PROMPTS[3], SamplingParams(max_tokens=16)))
    assert [token.id for token in tokens] == expected[: expected.index(expected[5]) + 1]


def test_two_hundred_requests_a_third_of_them_cut_off(engine_of: StartEngine) -> None:
    config = ModelConfig.of(make_model("llama").config)
    engine = engine_of(
        random_decoder(config, PRESETS["w8a8"], torch.float32, CPU), num_blocks=60, block_size=4, rows=12, budget=40
    )
    rng = random.Random(0)
    jobs = [([rng.randrange(256) for _ in range(rng.randint(1, 60))], rng.randint(1, 30)) for _ in range(200)]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for _, count in jobs]

    async def one(i: int) -> list[int]:
        stream = engine.submit(jobs[i][0], params[i], str(i))
        ids = []
        async for tokens in stream:
            ids += [token.id for token in tokens]
            if i % 3 == 0 and len(ids) >= jobs[i][1] // 2:
                stream.finish(FinishReason.ABORT)
        return ids

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(one(i) for i in range(200)))

    async def check() -> list[list[Token]]:
        return [await collect(engine, jobs[i][0], params[i], str(i)) for i in range(1, 200, 25) if i % 3]

    ids = asyncio.run(all_of_them())
    assert all(len(ids[i]) == jobs[i][1] for i in range(200) if i % 3)
    alone = asyncio.run(check())
    assert [[token.id for token in tokens] for tokens in alone] == [ids[i] for i in range(1, 200, 25) if i % 3]
    deadline = time.monotonic() + 10
    while engine.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().kv_cache_usage_ratio == 0
    assert engine.stats().num_preemptions > 0


def test_a_full_queue_refuses_and_loses_nothing() -> None:
    runner = ScriptedRunner(step_s=0.002)
    engine = EngineLoop(
        "w8a8",
        Scheduler(num_blocks=64, block_size=16, max_num_requests=2, max_batched_tokens=64),
        runner,
        device_thread=DeviceThread(),
        max_model_len=256,
        max_waiting=3,
    ).start()

    async def run() -> tuple[list[str], list[int]]:
        streams, refused = [], []
        for i in range(30):
            try:
                streams.append(engine.submit([1, 2], SamplingParams(max_tokens=5), str(i)))
            except QueueFull as error:
                refused.append(error.message)
        return refused, [len([t async for ts in stream for t in ts]) for stream in streams]

    refused, lengths = asyncio.run(run())
    assert refused
    assert all("3 requests are waiting" in message for message in refused)
    assert lengths == [5] * (30 - len(refused))
    engine.stop()


def test_a_device_thread_lets_one_in_at_a_time_in_order_and_on_one_thread() -> None:
    device_thread, inside, order, threads = DeviceThread(), [], [], set()

    def work(i: int) -> int:
        inside.append(i)
        assert len(inside) == 1
        threads.add(threading.get_ident())
        time.sleep(0.05)
        order.append(i)
        inside.remove(i)
        return 10 * i

    def enter(i: int) -> int:
        time.sleep(0.02 * i)
        return device_thread.run(work, i)

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(enter, range(5))) == [0, 10, 20, 30, 40]
    assert order == sorted(order)
    assert len(threads) == 1


def test_what_only_launches_runs_on_the_callers_thread_and_alone() -> None:
    device_thread, entered, leave, order = DeviceThread(), threading.Event(), threading.Event(), []

    def long() -> None:
        entered.set()
        assert leave.wait(5)
        order.append("long")

    def short() -> int:
        order.append("launch")
        return threading.get_ident()

    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(device_thread.run, long)
        assert entered.wait(5)
        launched = pool.submit(device_thread.launch, short)
        time.sleep(0.05)
        assert not order
        leave.set()
        before.result(5)
        ident = launched.result(5)
    assert order == ["long", "launch"]
    assert ident != device_thread.run(threading.get_ident)
    with pytest.raises(ZeroDivisionError):
        device_thread.launch(divmod, 1, 0)
    assert device_thread.launch(divmod, 7, 2) == (3, 1)


@pytest.mark.parametrize(("is_async", "only_launches"), [(False, False), (True, False), (True, True)])
def test_a_start_is_told_before_a_step_that_takes_time_and_after_one_that_is_only_launched(
    is_async: bool, only_launches: bool
) -> None:
    """A process that dies in its step must have told whose it was; a launch need not wait for who hears of it."""
    runner, order = ScriptedRunner(is_async), []
    runner.only_launches = only_launches
    names = set()

    def note(number: int) -> None:
        order.append(f"step {number}")
        names.add(threading.current_thread().name)

    runner.on_execute = note
    plan = Scheduler(num_blocks=50, block_size=4, max_num_requests=3, max_batched_tokens=64)
    engine = EngineLoop("w8a8", plan, runner, device_thread=DeviceThread(), max_model_len=200)
    engine.serve(lambda news: order.extend([*["start"] * len(news.scheduled), *["token"] * len(news.handles)]))
    engine.start().put(Submit("w8a8", 1, 1, "r", [1, 2, 3], SamplingParams(max_tokens=1), 0.0, 0))
    until_s = time.perf_counter() + 5
    while "token" not in order and time.perf_counter() < until_s:
        time.sleep(0.001)
    engine.stop()
    first = ["step 0", "start"] if only_launches else ["start", "step 0"]
    assert order[:3] == [*first, "token"]
    assert names == {"engine-w8a8" if only_launches else DEVICE_THREAD}


def test_a_device_thread_hands_back_what_the_work_raises() -> None:
    device_thread = DeviceThread()
    with pytest.raises(ZeroDivisionError):
        device_thread.run(divmod, 1, 0)
    assert device_thread.run(divmod, 7, 2) == (3, 1)


def test_a_device_thread_ends_with_its_last_user() -> None:
    device_thread = DeviceThread()
    thread = device_thread.run(threading.current_thread)
    del device_thread
    thread.join(5)
    assert not thread.is_alive()
