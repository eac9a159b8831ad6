"""Types that several tests name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from service.engine.loop import EngineLoop

Samples = dict[tuple[str, ...], float]
"""What /metrics says, as `metrics_of` reads it."""

StartEngine = Callable[..., EngineLoop]
"""An engine that has started and ends with its test; takes what its fixture says."""

Tiny = Callable[[str], tuple[PreTrainedModel, Path]]
"""What the fixture `tiny` is: name -> (model, folder)."""
