"""The columns of the table of families: names of the checkpoint's modules, and differences from Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Names:
    """The names of modules in a family's checkpoint; those of a layer are appended to `layers`.{index}.

    positions: the table of learned positions; None for rotary ones.
    qkv: query, key and value, or the one Linear that contains all three.
    head_norms: the norms of a head's queries and of its keys.
    post_attention_norm, post_mlp_norm: norms of a branch's output.
    mlp: prefix of `up`, `down`, `gate` (the router) and `experts.{number}`.
    up: gate and up, or the one Linear that contains both; if the MLP is not gated, its first Linear.
    """

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    head_norms: tuple[str, str] | None = None
    o: str = "self_attn.o_proj"
    post_attention_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp."
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    post_mlp_norm: str | None = None

    def layer(self, index: int) -> str:
        return f"{self.layers}.{index}"

    def mlps(self, index: int, num_experts: int) -> list[str]:
        """The prefixes of `up` and `down`, one for each expert of a layer, or one for its only MLP."""
        mlp = f"{self.layer(index)}.{self.mlp}"
        return [f"{mlp}experts.{number}." for number in range(num_experts)] or [mlp]

    def router(self, index: int) -> str:
        return f"{self.layer(index)}.{self.mlp}gate"


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The experts of the layers that have them.

    per_token: experts that a token visits.   intermediate_size: of one expert.
    is_renormalized: whether the shares of a token's experts are scaled to sum to 1.
    """

    count: int
    per_token: int
    intermediate_size: int
    is_renormalized: bool
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Family:
    """How a family differs from Llama. Differences within a family are functions of the Hugging Face configuration.

    norm: RMSNorm, or LayerNorm with a bias.
    norm_offset: added to every RMSNorm's weight.
    is_gated: whether the MLP multiplies two projections.
    has_head_major_qkv: the fused rows are ordered by head, each with its query, key and value.
    is_transposed: weights are stored [in, out].
    position_offset: row of position 0 in the table of learned positions.
    has_window: applies the configuration's sliding window.
    has_partial_rope: applies the configuration's partial_rotary_factor.
    has_scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
    qkv_bias, o_bias, mlp_bias: whether the projections have a bias.
    is_parallel: attention and MLP read the same residual.
    experts: returns None if no layer has any.
    unserved: returns which feature of the configuration is not served, and why; None if all are.
    """

    names: Names = Names()
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    is_gated: bool = True
    has_head_major_qkv: bool = False
    is_transposed: bool = False
    position_offset: int = 0
    has_window: bool = False
    has_partial_rope: bool = False
    has_scaled_embedding: bool = False
    qkv_bias: Callable[[PreTrainedConfig], bool] = lambda _: False
    o_bias: Callable[[PreTrainedConfig], bool] = lambda _: False
    mlp_bias: Callable[[PreTrainedConfig], bool] = lambda _: False
    is_parallel: Callable[[PreTrainedConfig], bool] = lambda _: False
    experts: Callable[[PreTrainedConfig], ExpertShape | None] = lambda _: None
    unserved: Callable[[PreTrainedConfig], str | None] = lambda _: None
