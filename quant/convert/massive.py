"""Tokens whose activations are many times as large as any other's, and spoil a scale that all tokens share.

They are found where the calibration text is read anyway: in the residual stream behind each layer.

Source: Massive Activations in Large Language Models (arXiv 2402.17762), section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASSIVE = 100.0
"""A token is massive if its largest value is more than this many times the median token's."""

MAX_NOTED = 64
"""Most tokens noted of a layer, and kinds of tokens of a model."""


class MassiveToken(NamedTuple):
    """A token of the vocabulary that was massive in some places of the calibration windows.

    num_places: how many.   first: the earliest position among them.   is_sink: whether all are kept in float.
    ratio: of its largest value to the median token's, in the layer where that is largest.
    """

    token_id: int
    num_places: int
    first: int
    ratio: float
    layer: int
    is_sink: bool


def massive_places(hidden: Sequence[Tensor]) -> list[tuple[int, int, float]]:
    """(window, position, ratio) of the massive tokens of a layer's outputs [1, L, hidden], the largest first."""
    sizes = torch.stack([window[0].abs().amax(-1).float() for window in hidden])
    ratios = sizes / sizes.median().clamp_min(torch.finfo(torch.float32).tiny)
    places = (ratios > MASSIVE).nonzero().tolist()
    found = [(window, position, float(ratios[window, position])) for window, position in places]
    return sorted(found, key=lambda place: -place[2])[:MAX_NOTED]


def massive_tokens(
    places: Sequence[Sequence[Sequence[float]]], windows: Tensor | None, num_sinks: int
) -> list[MassiveToken]:
    """The massive tokens of all layers by token, those in the most places first.

    Args:
        places: of each layer, what `massive_places` found; entries of JSON, so lists.
        windows: [n, L] token ids; without any no place is known.
        num_sinks: tokens at the start of each window that are kept in float.
    """
    largest: dict[tuple[int, int], tuple[float, int]] = {}
    for layer, found in enumerate(places):
        for window, position, ratio in found:
            place = int(window), int(position)
            largest[place] = max(largest.get(place, (0.0, layer)), (float(ratio), layer))
    if windows is None:
        return []
    by_token: dict[int, list[tuple[int, float, int]]] = {}
    for (window, position), (ratio, layer) in largest.items():
        by_token.setdefault(int(windows[window, position]), []).append((position, ratio, layer))
    tokens = [_joined(token_id, found, num_sinks) for token_id, found in by_token.items()]
    return sorted(tokens, key=lambda token: (-token.num_places, -token.ratio))[:MAX_NOTED]


def _joined(token_id: int, found: Sequence[tuple[int, float, int]], num_sinks: int) -> MassiveToken:
    _, ratio, layer = max(found, key=lambda place: place[1])
    positions = [position for position, _, _ in found]
    return MassiveToken(token_id, len(found), min(positions), round(ratio, 1), layer, max(positions) < num_sinks)


def noted_tokens(notes: Mapping[str, Any]) -> list[MassiveToken]:
    """What ottava.json says of them."""
    return [MassiveToken(**entry) for entry in notes.get("massive_tokens", [])]
