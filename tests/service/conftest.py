"""Tiny random models of every family, made by Hugging Face's own code, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.support.tiny_models import make_model


@pytest.fixture(autouse=True)
def _checked_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of this process check their blocks whenever they have nothing to do, however short that is."""
    monkeypatch.setattr("service.engine.loop.CHECK_AFTER_S", 0.0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PreTrainedModel, Path]]:
    """name -> (model, folder); each made once."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def get(name: str) -> tuple[PreTrainedModel, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = make_model(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return get
