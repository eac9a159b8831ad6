"""Tables of rotary angles by position. Served are rotary types whose angles do not depend on the request."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from service.errors import UnsupportedModel
from service.models.fields import checked_count, count, own_value, shown

STATIC_ROPE = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotary types whose angles do not depend on the length of the request. longrope's change beyond the positions of its
pretraining, so it is served up to those, with its short factors."""

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Hugging Face's names of layers without and with a window."""


def rope_parameters(config: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """The rotary parameters by type of layer; keyed by None if all layers share them, empty for learned positions."""
    _, parameters = own_value(config, "rope_parameters")
    if parameters is None:
        return {}
    found: dict[str | None, Any] = {None: parameters}
    if GLOBAL in parameters:
        found = {kind: parameters.get(kind) for kind in (GLOBAL, LOCAL)}
    for kind, own in found.items():
        if not isinstance(own, dict):
            raise UnsupportedModel(f"the rotary parameters of {kind} are {shown(own)}; an object is served")
    return found


def refuse_rope(parameters: dict[str, Any], has_partial: bool, head_size: int) -> None:
    """Raise UnsupportedModel for a dynamic rotary type or a partial rotary factor that is not served."""
    rope_type = parameters.get("rope_type", "default")
    if not isinstance(rope_type, str) or rope_type not in STATIC_ROPE:
        raise UnsupportedModel(f"rope type {shown(rope_type)} is not served; the types are {', '.join(STATIC_ROPE)}")
    factor = parameters.get("partial_rotary_factor", 1.0)
    if not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise UnsupportedModel(f"partial_rotary_factor {shown(factor)} is not served; numbers above 0, up to 1, are")
    if factor != 1.0 and not has_partial:
        raise UnsupportedModel(f"partial_rotary_factor {factor} is not served for this family; 1 is")
    if int(head_size * factor) % 2:
        raise UnsupportedModel(
            f"partial_rotary_factor {factor} turns {int(head_size * factor)} of {head_size} columns of a head; "
            "an even number is served"
        )


def max_positions(config: PreTrainedConfig) -> int:
    """Number of positions that the model was made for and whose angles are served."""
    limits = [
        checked_count("original_max_position_embeddings", parameters.get("original_max_position_embeddings"))
        for parameters in rope_parameters(config).values()
        if parameters.get("rope_type") == "longrope"
    ]
    return min([count(config, "max_position_embeddings"), *limits])


def rope_tables(config: PreTrainedConfig, head_size: int, length: int) -> tuple[Tensor, Tensor | None]:
    """cos and sin by position, [length, R] float32, of global layers, and of local ones if different, else None.

    R is 0 for learned positions.
    """
    parameters = rope_parameters(config)
    if not parameters:
        return torch.zeros(length, 0), None
    tables = [_rope_table(config, kind, own, head_size, length) for kind, own in parameters.items()]
    return tables[0], tables[1] if len(tables) > 1 else None


def _rope_table(
    config: PreTrainedConfig, kind: str | None, parameters: dict[str, Any], head_size: int, length: int
) -> Tensor:
    """cos and sin of position * frequency, times the type's attention factor. Raises UnsupportedModel if not finite."""
    try:
        table = _angles(config, kind, parameters, head_size, length)
    except Exception as error:  # What transformers' functions raise of a value that they do not expect is not limited.
        raise UnsupportedModel(f"no angles follow from rope_parameters {shown(parameters)}: {error!r}") from error
    if not bool(table.isfinite().all()):
        raise UnsupportedModel(f"the angles of rope_parameters {shown(parameters)} are not finite")
    return table


def _angles(
    config: PreTrainedConfig, kind: str | None, parameters: dict[str, Any], head_size: int, length: int
) -> Tensor:
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        num_turned = int(head_size * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, num_turned, 2, dtype=torch.float64) / num_turned
        frequencies, factor = torch.exp(-exponents * math.log(parameters["rope_theta"])), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), layer_type=kind)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies.double())
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(factor).float()
