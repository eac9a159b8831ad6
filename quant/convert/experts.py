"""Experts as checkpoints store them, one Linear per projection; transformers stacks a layer's experts in one tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)) of one expert."""

    def __init__(self, hidden_size: int, inner_size: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y


class SeparateExperts(nn.ModuleList):
    """The experts of one layer, with the signature of transformers' stacked ones."""

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """sum_e weights_te expert_e(x_t) over the experts chosen for each token.

        Args:
            x: [T, K] float.
            expert_ids: [T, E] int64, the experts of each token.
            weights: [T, E] float, their weights.
        """
        y = torch.zeros_like(x)
        for index in torch.unique(expert_ids).tolist():
            tokens, places = torch.where(expert_ids == index)
            part = self[index](x[tokens]) * weights[tokens, places, None]
            y.index_add_(0, tokens, part.to(y.dtype))
        return y


def separate_experts(model: nn.Module) -> None:
    """Replace, in place, every stack of gated experts by one Linear per projection, with parameters without values."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            stacked = getattr(child, "gate_up_proj", None)
            if isinstance(stacked, nn.Parameter) and stacked.ndim == 3:
                num_experts, twice_inner, hidden = stacked.shape
                act: Callable[[Tensor], Tensor] = child.act_fn  # type: ignore[assignment]
                experts = (Expert(hidden, twice_inner // 2, act) for _ in range(num_experts))
                setattr(parent, name, SeparateExperts(experts))
