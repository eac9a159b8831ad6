"""From when to when the device is taken to compute a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant.scheme import PRESETS
from service.engine.device.runner import Runner
from service.engine.scheduler import Chunk, Step
from service.models.config import ModelConfig
from service.models.random_weights import random_decoder
from tests.support.requests import new_request
from tests.support.tiny_models import make_model


def test_a_step_begins_once_the_host_has_built_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a device that waits for the host would seem slow, and get shorter steps: more work for the host."""
    decoder = random_decoder(
        ModelConfig.of(make_model("llama").config), PRESETS["w8a8"], torch.float32, torch.device("cpu")
    )
    runner = Runner(decoder, num_blocks=8, block_size=16, max_requests=4, max_tokens=16)
    log: list[str] = []

    def note(name: str, call: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return call(*args, **kwargs)

        return noted

    monkeypatch.setattr(runner._tables, "build", note("tables", runner._tables.build))
    monkeypatch.setattr(runner._batches, "build", note("copies", runner._batches.build))
    monkeypatch.setattr(runner, "_forward", note("forward", runner._forward))
    monkeypatch.setattr(runner, "_mark", note("mark", runner._mark))
    request = new_request("0", 4)
    request.row, request.blocks = 0, [1]
    runner.execute(Step([Chunk(request, 0, 4, True, 0)]))
    assert log == ["tables", "copies", "mark", "forward"]
