"""The Linears of one layer that a scheme quantizes, and the groups into which smoothing can be folded exactly."""

from __future__ import annotations

from dataclasses import replace

from quant.convert.smoothquant import SmoothGroup
from service.models.family import Family


def layer_linears(family: Family, index: int, num_experts: int) -> list[str]:
    """All Linears of a layer except a router."""
    names = family.names
    attention = [f"{names.layer(index)}.{part}" for part in (*names.qkv, names.o)]
    return attention + [f"{mlp}{part}" for mlp in names.mlps(index, num_experts) for part in (*names.up, names.down)]


def layer_downs(family: Family, index: int, num_experts: int) -> list[str]:
    """The last Linear of each MLP of a layer."""
    return [f"{mlp}{family.names.down}" for mlp in family.names.mlps(index, num_experts)]


def layer_groups(
    family: Family, index: int, *, num_experts: int, is_up_linear: bool, num_copies: int, head_size: int
) -> list[SmoothGroup]:
    """The groups of a layer, in the order in which activations flow.

    Norms pair with the Linears that read them; all experts and their router read one norm, so they share one s. v pairs
    with o, since attention's output is linear in v, and up with down; neither does if v or up is a slice of a fused
    Linear. A norm between o and the residual normalizes its input, so nothing can be folded into it.

    Args:
        is_up_linear: whether down's input is proportional to up's output.
        num_copies: query heads that share one value head, of head_size channels.
    """
    names, layer = family.names, family.names.layer(index)
    mlps = names.mlps(index, num_experts)
    readers = [f"{mlp}{part}" for mlp in mlps for part in names.up] + ([names.router(index)] if num_experts else [])
    qkv = tuple(f"{layer}.{part}" for part in names.qkv)
    norms = [
        SmoothGroup(f"{layer}.{names.attention_norm}", qkv, offset=family.norm_offset),
        SmoothGroup(f"{layer}.{names.mlp_norm}", tuple(readers), offset=family.norm_offset),
    ]
    v_to_o = SmoothGroup(qkv[-1], (f"{layer}.{names.o}",))
    if num_copies > 1:
        v_to_o = replace(v_to_o, num_copies=num_copies, head_size=head_size)
    gate = names.up[0] if family.is_gated else None
    up_to_down = [
        SmoothGroup(f"{mlp}{names.up[-1]}", (f"{mlp}{names.down}",), gate=gate and f"{mlp}{gate}") for mlp in mlps
    ]
    is_up_apart = is_up_linear and len(names.up) == 1 + family.is_gated
    return [norms[0], *([v_to_o] if len(qkv) > 1 else []), norms[1], *(up_to_down if is_up_apart else [])]
