"""Engines over tiny models on the CPU, and what they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import torch

from service.engine.api import SamplingParams, Token
from service.engine.device.device_thread import DeviceThread
from service.engine.device.runner import Runner
from service.engine.loop import EngineLoop, StepRunner
from service.engine.scheduler import Scheduler
from service.models.decoder import Decoder
from tests.support.grammars import REGISTRY

CPU = torch.device("cpu")


PROMPTS = [[(7 * i * j + 3 * j + i) % 250 + 3 for j in range(2 + 5 * i)] for i in range(12)]


def make_engine(
    decoder: Decoder,
    num_blocks: int = 200,
    block_size: int = 16,
    rows: int = 16,
    budget: int = 64,
    wrap: Callable[[Runner], StepRunner] | None = None,
    **kwargs: Any,
) -> EngineLoop:
    """wrap: makes another runner of the one that computes."""
    runner = Runner(decoder, num_blocks=num_blocks, block_size=block_size, max_requests=rows, max_tokens=budget)
    plan = Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_requests=rows,
        max_batched_tokens=budget,
        eos_ids=frozenset(kwargs.pop("eos_ids", ())),
        has_prefix_cache=kwargs.pop("has_prefix_cache", True),
        speculation=kwargs.pop("speculation", None),
    )
    return EngineLoop(
        "w8a8",
        plan,
        runner if wrap is None else wrap(runner),
        device_thread=DeviceThread(),
        max_model_len=decoder.max_model_len,
        first_ids=decoder.sink_ids,
        grammars=REGISTRY,
        **kwargs,
    ).start()


async def collect(engine: EngineLoop, prompt: list[int], params: SamplingParams, name: str = "r") -> list[Token]:
    return [token async for tokens in engine.submit(prompt, params, name) for token in tokens]


async def collect_all(engine: EngineLoop, prompts: Iterable[list[int]], params: SamplingParams) -> list[list[int]]:
    runs = [collect(engine, prompt, params, str(i)) for i, prompt in enumerate(prompts)]
    return [[token.id for token in tokens] for tokens in await asyncio.gather(*runs)]
