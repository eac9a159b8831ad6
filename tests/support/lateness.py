"""A runner on the CPU whose steps are read one step late, as a GPU's are."""

from __future__ import annotations

from service.engine.device.device_thread import DeviceThread
from service.engine.device.runner import Runner
from service.engine.loop import EngineLoop
from service.engine.scheduler import Scheduler
from service.models.decoder import Decoder
from tests.support.grammars import REGISTRY


class LateRunner:
    is_async = True

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.kv_cache_bytes = runner.kv_cache_bytes

    def execute(self, step):
        return self.runner.execute(step)


def start_late(decoder: Decoder, num_blocks=200, block_size=16, rows=16, budget=64, eos_ids=()) -> EngineLoop:
    runner = LateRunner(
        Runner(decoder, num_blocks=num_blocks, block_size=block_size, max_requests=rows, max_tokens=budget)
    )
    plan = Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_requests=rows,
        max_batched_tokens=budget,
        eos_ids=frozenset(eos_ids),
    )
    return EngineLoop(
        "w8a8",
        plan,
        runner,
        device_thread=DeviceThread(),
        max_model_len=decoder.config.max_model_len,
        grammars=REGISTRY,
    ).start()
