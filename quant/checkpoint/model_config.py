"""Reads config.json as a configuration of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from quant.checkpoint.json_file import read_json
from quant.errors import CheckpointError

MAX_LAYERS = 10_000
LAYERS = ("num_hidden_layers", "n_layer")
"""Keys of numbers of which transformers makes lists, of whatever length."""

COUNTS = ("hidden_size", "n_embd", "num_attention_heads", "n_head", "num_key_value_heads")
"""Keys of numbers that transformers divides by."""

LABELS = ("num_labels", "id2label", "label2id")
"""Keys of classifiers; likewise."""


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model folder. No other file is read, whatever config.json names.

    Raises:
        CheckpointError: there is no config.json, or transformers does not know it as a configuration of its model_type.
    """
    path = folder / "config.json"
    content = read_json(path)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path} cannot be read: its model_type is {_shown(kind)}, which transformers does not know; mend it, or "
            "take another model"
        )
    _refuse_unserved(path, content)
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(
            {key: value for key, value in content.items() if key not in LABELS}
        )
    except Exception as error:  # What a configuration raises of a value that it does not expect is not limited.
        raise CheckpointError(f"{path} cannot be read: {_said(error)}") from error
    return config


def _refuse_unserved(path: Path, content: dict[str, Any]) -> None:
    if content.get("per_layer_config"):
        raise CheckpointError(f"{path}: per_layer_config, layers that differ from one another, is not served")
    for key in LAYERS:
        value = content.get(key)
        if isinstance(value, int) and value > MAX_LAYERS:
            raise CheckpointError(f"{path}: {key} is {value}; at most {MAX_LAYERS} are served")
    for key in COUNTS:
        value = content.get(key)
        if isinstance(value, int) and value < 1:
            raise CheckpointError(f"{path}: {key} is {value}; a whole number from 1 is served")


def _said(error: Exception) -> str:
    """An error of transformers in one line, of which the cause is the second one."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def _shown(value: object) -> str:
    """A value of a file, cut to what a line can show."""
    return repr(value)[:100]
