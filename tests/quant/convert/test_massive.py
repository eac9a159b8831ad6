"""Massive tokens are found where they were planted, and nowhere else."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.checkpoint.notes import NOTES_NAME
from quant.convert.massive import MAX_NOTED, MassiveToken, massive_places, massive_tokens, noted_tokens
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
    assert (token.token_id, token.num_places, token.first, token.is_sink) == (PLANTED, 3, 0, False)
    assert token.ratio > 100


def test_ordinary_tokens_are_none(tiny: Tiny, tmp_path: Path) -> None:
    assert found_in(tiny, tmp_path, 1.0) == []


def test_what_a_sink_leaves_is_told(tiny: Tiny, tmp_path: Path) -> None:
    """The planted token begins every window, and stands elsewhere too."""
    (token,) = found_in(tiny, tmp_path, 3e4, (PLANTED,))
    assert (token.num_places, token.first, token.is_sink) == (5, 0, False)


@pytest.mark.parametrize("num_sinks", [0, 1])
def test_places_of_all_layers_are_joined_by_token(num_sinks: int) -> None:
    windows = torch.tensor([[5, 6, 7], [5, 8, 6]])
    places = [[(0, 0, 300.0)], [(0, 0, 900.0), (1, 0, 200.0), (1, 2, 150.0)]]
    expected = [MassiveToken(5, 2, 0, 900.0, 1, num_sinks == 1), MassiveToken(6, 1, 2, 150.0, 1, False)]
    assert massive_tokens(json.loads(json.dumps(places)), windows, num_sinks) == expected
    assert massive_tokens([[]], None, 0) == []


def test_many_are_cut_off_the_smallest() -> None:
    hidden = torch.ones(1, 1000, 4)
    hidden[0, :100, 0] = 1000.0 + torch.arange(100)
    places = massive_places([hidden])
    assert len(places) == MAX_NOTED
    assert places[0] == (0, 99, 1099.0)
    assert places[-1][2] == 1099.0 - MAX_NOTED + 1
