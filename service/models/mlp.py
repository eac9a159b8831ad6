"""The MLP of a layer: gated, plain, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from kernels import Quantized, ToInt8
from quant.fused import GatedLinear, take_rows
from quant.part import Part
from service.models.config import ModelConfig
from service.models.sharding import ALONE, Ranks, columns, rows
from service.models.weights import Linear, Weights

Product = Callable[[Tensor, ToInt8 | None], Tensor | Quantized]

GATED: dict[str, Product] = {"silu": kernels.silu_mul, "gelu_tanh": kernels.gelu_mul}
PLAIN: dict[str, Product] = {
    "relu": kernels.relu,
    "gelu": lambda x, quantize: kernels.gelu(x, "none", quantize),
    "gelu_tanh": lambda x, quantize: kernels.gelu(x, "tanh", quantize),
}


class GatedMLP:
    """down(act(gate(x)) * up(x))."""

    def __init__(self, gated: GatedLinear, down: Linear) -> None:
        self.gated = gated
        self.down = down

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.gated.linear, self.down

    @property
    def input_format(self) -> ToInt8 | None:
        return self.gated.input_format

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        return self.down(self.gated(x))


class PlainMLP:
    """down(act(up(x)))."""

    def __init__(self, up: Linear, act: Product, down: Linear) -> None:
        self.up = up
        self.act = act
        self.down = down

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.up, self.down

    @property
    def input_format(self) -> ToInt8 | None:
        return self.up.input_format

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        return self.down(self.act(self.up(x), self.down.input_format))


class Experts:
    """sum_e share_te expert_e(x_t) over the experts with the largest shares of each token.

    share_t = softmax(router(x_t)), scaled to sum to 1 over the chosen experts if is_renormalized.

    The host waits to read how many tokens each expert gets, so no step can be captured in a CUDA graph. The router
    reads floats; int8 experts quantize the rows that they get.

    Source: Mixtral (arXiv 2401.04088), section 2.1.
    """

    input_format: ToInt8 | None = None

    def __init__(self, router: Linear, experts: list[GatedMLP], per_token: int, is_renormalized: bool) -> None:
        self.router = router
        self.experts = experts
        self.per_token = per_token
        self.is_renormalized = is_renormalized

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.router, *(linear for expert in self.experts for linear in expert.linears)

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)  # because input_format is None
        shares, chosen = self._route(x)
        # Rows are sorted by expert and then back, so that a token sums its experts in the order of its choice each run.
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        pieces = torch.split(x[order // self.per_token], counts)
        parts = [expert(rows) for expert, rows in zip(self.experts, pieces, strict=True) if len(rows)]
        y = torch.empty_like(torch.cat(parts)).index_copy_(0, order, torch.cat(parts))
        y = y.view(*chosen.shape, -1).float() * shares.unsqueeze(-1)
        return y.sum(1).to(x.dtype)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shares float32 and experts int64, each [T, per_token]."""
        shares, chosen = self.router(x).float().softmax(-1).topk(self.per_token)
        return (shares / shares.sum(-1, keepdim=True) if self.is_renormalized else shares), chosen


def load_mlp(config: ModelConfig, weights: Weights, index: int, ranks: Ranks = ALONE) -> GatedMLP | PlainMLP | Experts:
    """Load the MLP or the experts of a layer; of each the rank's columns."""
    names, shape = config.layout.names, config.experts
    num_experts = config.num_experts(index)
    width = shape.intermediate_size if shape is not None and num_experts else config.intermediate_size
    mlps = [_one_mlp(config, weights, prefix, width, ranks) for prefix in names.mlps(index, num_experts)]
    if shape is None or not num_experts:
        return mlps[0]
    router = weights.linear(names.router(index), num_experts, config.hidden_size, has_bias=False)
    experts = [mlp for mlp in mlps if isinstance(mlp, GatedMLP)]
    return Experts(router, experts, shape.per_token, shape.is_renormalized)


def _one_mlp(config: ModelConfig, weights: Weights, prefix: str, width: int, ranks: Ranks) -> GatedMLP | PlainMLP:
    family, hidden = config.layout, config.hidden_size

    def linear(name: str, n: int, k: int, part: Part) -> Linear:
        return weights.linear(prefix + name, n, k, config.mlp_bias, is_transposed=family.is_transposed, part=part)

    down = linear(family.names.down, hidden, width, columns(ranks, width))
    if not family.is_gated:
        up = linear(family.names.up[0], width, hidden, rows(ranks, width))
        return PlainMLP(up, PLAIN[config.activation], down)
    if len(family.names.up) == 1:
        fused = linear(family.names.up[0], 2 * width, hidden, rows(ranks, width, width))
        gate, up = (take_rows(fused, half) for half in torch.arange(fused.shape[0]).chunk(2))
    else:
        gate, up = (linear(name, width, hidden, rows(ranks, width)) for name in family.names.up)
    return GatedMLP(GatedLinear(gate, up, down.input_format, product=GATED[config.activation]), down)
