"""Massive tokens are found where they were planted, and nowhere else."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from quant.checkpoint.notes import NOTES_NAME
from quant.convert.massive import MAX_NOTED, MassiveToken, joined, massive_tokens, noted_tokens
from quant.scheme import PRESETS
from tests.support.tiny_llama import NUM_LAYERS, Tiny

PLANTED = 7


def found_in(tiny: Tiny, tmp_path: Path, factor: float, sink: tuple[int, ...] = ()) -> list[MassiveToken]:
    """What is noted of a tiny model in which the embedding of one token is multiplied."""
    model = deepcopy(tiny.model)
    dict(model.named_parameters())["model.embed_tokens.weight"].data[PLANTED] *= factor
    model.save_pretrained(tmp_path / "model")
    windows = torch.arange(8, 24).repeat(3, 1)
    windows[0, 2] = windows[1, 0] = windows[1, 5] = PLANTED
    windows[:, : len(sink)] = torch.tensor(sink, dtype=torch.int64)
    planted = replace(tiny, folder=tmp_path / "model", windows=windows)
    names = [[f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkv"] for layer in range(NUM_LAYERS)]
    out = planted.quantize(
        tmp_path / "out", PRESETS["smoothquant-o3"].with_sink(sink), qkv_names=tuple(map(tuple, names))
    )
    return noted_tokens(json.loads((out / NOTES_NAME).read_text()))


def test_a_planted_token_is_found_in_all_its_places(tiny: Tiny, tmp_path: Path) -> None:
    (token,) = found_in(tiny, tmp_path, 3e4)
    assert (token.token_id, token.num_places, token.first) == (PLANTED, 3, 0)
    assert token.ratio > 100


def test_ordinary_tokens_are_none(tiny: Tiny, tmp_path: Path) -> None:
    assert found_in(tiny, tmp_path, 1.0) == []


def test_what_a_sink_leaves_is_told(tiny: Tiny, tmp_path: Path) -> None:
    """The planted token begins every window, and stands elsewhere too."""
    (token,) = found_in(tiny, tmp_path, 3e4, (PLANTED,))
    assert (token.num_places, token.first) == (2, 2)


def test_a_sink_in_many_windows_hides_no_other_token() -> None:
    windows = torch.arange(10, 20).repeat(3 * MAX_NOTED, 1)
    hidden = [torch.ones(1, 10, 4) for _ in windows]
    for window in hidden:
        window[0, 0] = 5000.0
    hidden[4][0, 3, 2] = -500.0
    assert massive_tokens(hidden, windows, 1, 2) == [MassiveToken(13, 1, 3, 500.0, 2)]
    first, other = massive_tokens(hidden, windows, 0, 2)
    assert (first.token_id, first.num_places, other.token_id) == (10, 3 * MAX_NOTED, 13)


def test_layers_are_joined_by_token() -> None:
    layers = [[MassiveToken(5, 1, 0, 300.0, 0)], [MassiveToken(5, 2, 3, 900.0, 1), MassiveToken(6, 1, 2, 150.0, 1)]]
    assert joined(layers) == [MassiveToken(5, 2, 0, 900.0, 1), MassiveToken(6, 1, 2, 150.0, 1)]
    kinds = [[MassiveToken(number, 1, 0, 100.0 + number, 0) for number in range(100)]]
    assert [token.token_id for token in joined(kinds)] == list(range(99, 99 - MAX_NOTED, -1))
