"""What fixtures of these tests hand out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from service.engine.loop import EngineLoop

Tiny = Callable[[str], tuple[PreTrainedModel, Path]]
"""name -> (model, folder)."""

StartEngine = Callable[..., EngineLoop]
"""An engine that has started and ends with its test; takes what its fixture says."""
