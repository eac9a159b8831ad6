"""A runner on the CPU whose steps are read one step late, as a GPU's are."""

from __future__ import annotations

from typing import Any

from service.engine.device.runner import Runner, Sampled
from service.engine.loop import EngineLoop
from service.engine.scheduler import Step
from service.models.decoder import Decoder
from tests.support.engines import make_engine


class LateRunner:
    is_async, only_launches = True, False

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.kv_cache_bytes = runner.kv_cache_bytes

    def execute(self, step: Step) -> Sampled:
        return self.runner.execute(step)


def start_late(decoder: Decoder, **options: Any) -> EngineLoop:
    """See `make_engine`."""
    return make_engine(decoder, wrap=LateRunner, **options)
