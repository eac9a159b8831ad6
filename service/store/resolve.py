"""Resolves a model's name to a folder: the demo model, a local folder, or a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from quant.checkpoint.json_file import read_json
from service.errors import ModelNotFound, first_line
from service.models.loader import refuse_unsafe
from service.store.demo import prepare_demo_model

FETCHED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
"""The files of a model to download: never pickled weights, never code."""


def resolve_model(name: str | None, cache: Path, on_stage: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of a model. name: a local folder, a Hugging Face id to download, or None for the demo model.

    Raises:
        ModelNotFound: name is neither a folder nor an id that can be fetched.
        UnsafeCheckpoint: the weights are pickled.
    """
    if name is None:
        return prepare_demo_model(cache, on_stage)
    folder = Path(name)
    if not folder.is_dir():
        folder = _fetch(name, on_stage)
    refuse_unsafe(folder)
    return folder


def _fetch(name: str, on_stage: Callable[[str], None]) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_file():
        raise ModelNotFound(f"{name} is not a folder; name a model folder or a Hugging Face id such as owner/model")
    on_stage(f"fetching {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=FETCHED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{name} is neither a folder nor a model that can be fetched ({first_line(error)})"
        ) from error


def is_quantized(folder: Path) -> bool:
    """Whether a model folder's config.json has a quantization_config.

    Raises:
        CheckpointError: config.json is not a JSON object.
    """
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("quantization_config") is not None
