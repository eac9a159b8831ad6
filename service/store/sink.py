"""Chooses the tokens that a scheme keeps in float at the start of every text; see `quant.checkpoint.sink`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from quant.checkpoint.model_config import read_config
from quant.convert.calibration import prompt_lead
from quant.scheme import MAX_SINK_TOKENS, Scheme
from service.errors import InvalidSettings
from service.models.config import ModelConfig
from service.settings import Settings
from service.store.tokenizer import text_tokenizer

SinkWish = Literal["auto", "on", "off"]


def with_sink(folder: Path, scheme: Scheme, wish: SinkWish) -> Scheme:
    """The scheme with the sink that a float model gets.

    Args:
        wish: "auto" for the tokens that the tokenizer begins every prompt with, if tokens share scales: then the model
            computes what it would without. "on" for those, or for its BOS or end token, which is added to every prompt.

    Raises:
        InvalidSettings: wished for, and the model has no such token, or has experts.
        UnsupportedModel: the folder has no usable tokenizer.
    """
    if not scheme.is_int8 or wish == "off" or (wish == "auto" and not scheme.shares_activation_scales):
        return scheme
    config = ModelConfig.load(folder)
    if config.experts is not None:
        if wish == "on":
            raise InvalidSettings(
                "sink is on, but which tokens reach an expert is not known in calibration: leave sink off for a model "
                "with experts"
            )
        return scheme
    lead = [token for token in prompt_lead(text_tokenizer(folder)) if token < config.vocab_size]
    if lead or wish == "auto":
        return scheme.with_sink(lead[:MAX_SINK_TOKENS])
    return scheme.with_sink([_first_token(folder, config.vocab_size)])


def with_options(folder: Path, scheme: Scheme, settings: Settings) -> Scheme:
    """The scheme with the sink and the rotation that the settings ask for a float model. Raises as `with_sink`."""
    return with_sink(folder, scheme, settings.sink).with_rotation(settings.rotate)


def _first_token(folder: Path, vocab_size: int) -> int:
    """The BOS token of a model whose prompts begin with none, or an end token, after which texts begin in training."""
    config = read_config(folder)
    named = [config.bos_token_id, config.eos_token_id]
    ids = [token for entry in named for token in (entry if isinstance(entry, list) else [entry])]
    found = next((token for token in ids if isinstance(token, int) and 0 <= token < vocab_size), None)
    if found is None:
        raise InvalidSettings(
            f"sink is on, but {folder}/config.json names neither a bos_token_id nor an eos_token_id to begin texts "
            "with: add one, or leave sink off"
        )
    return found


def behind_sink(windows: Tensor, sink: tuple[int, ...]) -> Tensor:
    """Windows [n, L] that begin with the sink: as they are, or moved behind it and cut to L."""
    first = torch.tensor(sink, dtype=windows.dtype)
    if bool((windows[:, : len(sink)] == first).all()):
        return windows
    return torch.cat((first.expand(len(windows), -1), windows), dim=1)[:, : windows.shape[1]]
