"""Tokens whose activations are many times as large as any other's, and spoil a scale that all tokens share.

They are found where the calibration text is read anyway: in the residual stream behind each layer.

Source: Massive Activations in Large Language Models (arXiv 2402.17762), section 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASSIVE = 100.0
"""A token is massive if its largest value is more than this many times the median token's."""

MAX_NOTED = 64
"""Most tokens of the vocabulary that are noted of a layer and of a model."""


class MassiveToken(NamedTuple):
    """A token of the vocabulary that is massive in some places of the calibration windows.

    num_places: how many, in the layer with the most.   first: the earliest position among them.
    ratio: of its largest value to the median token's, in the layer where that is largest.
    """

    token_id: int
    num_places: int
    first: int
    ratio: float
    layer: int


def massive_tokens(hidden: Sequence[Tensor], windows: Tensor, num_sinks: int, layer: int) -> list[MassiveToken]:
    """Those of a layer's outputs [1, L, hidden] of each of the windows [n, L], the most frequent first.

    The first num_sinks tokens of a window are left out: they are kept in float.
    """
    sizes = torch.stack([window[0].abs().amax(-1).float().cpu() for window in hidden])
    ratios = sizes / sizes.median().clamp_min(torch.finfo(torch.float32).tiny)
    places: dict[int, list[tuple[int, float]]] = {}
    for window, position in (ratios[:, num_sinks:] > MASSIVE).nonzero().tolist():
        place = position + num_sinks, float(ratios[window, position + num_sinks])
        places.setdefault(int(windows[window, place[0]]), []).append(place)
    found = [
        MassiveToken(token_id, len(each), min(each)[0], round(max(ratio for _, ratio in each), 1), layer)
        for token_id, each in places.items()
    ]
    return _most(found)


def joined(layers: Iterable[Iterable[MassiveToken]]) -> list[MassiveToken]:
    """The tokens of all layers."""
    found: dict[int, MassiveToken] = {}
    for token in (token for tokens in layers for token in tokens):
        before = found.get(token.token_id, token)
        largest = max(before, token, key=lambda each: each.ratio)
        found[token.token_id] = MassiveToken(
            token.token_id,
            max(before.num_places, token.num_places),
            min(before.first, token.first),
            largest.ratio,
            largest.layer,
        )
    return _most(found.values())


def _most(tokens: Iterable[MassiveToken]) -> list[MassiveToken]:
    return sorted(tokens, key=lambda token: (-token.num_places, -token.ratio))[:MAX_NOTED]


def noted_tokens(notes: Mapping[str, Any]) -> list[MassiveToken]:
    """What ottava.json says of them."""
    return [MassiveToken(**entry) for entry in notes.get("massive_tokens", [])]
