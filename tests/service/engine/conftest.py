"""Engines over a scripted runner, ended with their test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.engine.device.device_thread import DeviceThread
from service.engine.loop import EngineLoop, StepRunner
from service.engine.scheduler import Scheduler
from service.engine.supervision import FaultLimits
from tests.service.kinds import StartEngine


@pytest.fixture
def engine_of() -> Iterator[StartEngine]:
    engines: list[EngineLoop] = []

    def start(
        runner: StepRunner,
        rows: int = 4,
        num_blocks: int = 64,
        block_size: int = 4,
        device_thread: DeviceThread | None = None,
        **limits: Any,
    ) -> EngineLoop:
        plan = Scheduler(num_blocks=num_blocks, block_size=block_size, max_num_requests=rows, max_batched_tokens=64)
        made = EngineLoop(
            "w8a8",
            plan,
            runner,
            device_thread=device_thread or DeviceThread(),
            max_model_len=256,
            limits=FaultLimits(**limits),
        )
        engines.append(made.start())
        return made

    yield start
    for engine in engines:
        engine.stop(1.0)
