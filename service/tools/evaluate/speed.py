"""Measures the decode speed of one request through scheduler and runner, with the engine's loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch

from service.engine.api import SamplingParams
from service.engine.device.runner import Runner
from service.engine.request import Request
from service.engine.scheduler import Scheduler, Step
from service.models.decoder import Decoder

PROMPT_LEN, NUM_STEPS = 64, 32
"""Sizes of the measurement, if the context is long enough; else half of the context each."""

SPEED_OF = f"decode of one request behind a prompt of {PROMPT_LEN} tokens, median of {NUM_STEPS} steps"
BLOCK_SIZE = 64


def decode_tokens_per_s(decoder: Decoder) -> float:
    """Tokens per second of one greedy request with fixed random ids, from the median of its steps."""
    context = decoder.config.max_model_len
    prompt_len = min(PROMPT_LEN, context // 2)
    num_steps = min(NUM_STEPS, context - prompt_len)
    num_blocks = -(-(prompt_len + num_steps) // BLOCK_SIZE) + 1
    runner = Runner(
        decoder,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_requests=1,
        max_tokens=prompt_len,
        has_drafts=False,
    )
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_requests=1, max_batched_tokens=prompt_len
    )
    runner.warm_up()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(decoder.config.vocab_size, (prompt_len,), generator=generator).tolist()
    scheduler.add(Request("speed", prompt, SamplingParams(num_steps, ignore_eos=True), 0.0, 0))
    times = [step_s for step, step_s in drive(scheduler, runner) if step.is_decode]
    return 1.0 / median(times)


def drive(scheduler: Scheduler, runner: Runner) -> Iterator[tuple[Step, float]]:
    """Run all requests as the engine does. Yields each step with the seconds since the previous one."""
    in_flight = None
    last = time.perf_counter()
    while not scheduler.is_idle or in_flight:
        step = scheduler.schedule(last)
        launched = None if step is None else (step, runner.execute(step))
        settled = in_flight if runner.is_async else launched
        in_flight = launched if runner.is_async else None
        if settled is not None:
            scheduler.commit(settled[0], settled[1].read())
            now = time.perf_counter()
            yield settled[0], now - last
            last = now
    scheduler.check_integrity()
