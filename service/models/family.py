"""What a row of the table of families can say: names of the checkpoint's modules, and the ways to differ from Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Names:
    """What a family's checkpoint calls its modules; names within a layer follow `layers`.{index}.

    positions: the table of learned positions; None for rotary ones.
    qkv: query, key and value, or the one Linear that holds all three.
    head_norms: the norms of a head's queries and of its keys.
    post_attention_norm, post_mlp_norm: norms of what a branch adds to the residual stream.
    mlp: what precedes `up`, `down`, `gate` (the router) and `experts.{number}`.
    up: gate and up, the one Linear that holds both, or where the MLP is not gated its first Linear.
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
        """What precedes `up` and `down` of each expert of a layer, or of its one MLP."""
        mlp = f"{self.layer(index)}.{self.mlp}"
        return [f"{mlp}experts.{number}." for number in range(num_experts)] or [mlp]

    def router(self, index: int) -> str:
        return f"{self.layer(index)}.{self.mlp}gate"


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Of the layers that have experts: how many, of what width, and how many a token visits.

    is_renormalized: whether the shares of a token's experts are scaled to sum to 1.
    """

    count: int
    per_token: int
    intermediate_size: int
    is_renormalized: bool
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Family:
    """How a family differs from Llama. What varies within it is asked of the Hugging Face configuration.

    norm: RMSNorm, or LayerNorm with a bias.
    norm_offset: added to every RMSNorm's weight.
    is_gated: whether the MLP multiplies two projections.
    has_head_major_qkv: the fused rows go head by head, each its query, key and value.
    is_transposed: weights are stored [in, out].
    position_offset: row of the table of learned positions that position 0 reads.
    has_window: honours the configuration's sliding window.
    has_partial_rope: honours the configuration's partial_rotary_factor.
    has_scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
    qkv_bias, o_bias, mlp_bias: whether the projections carry a bias.
    is_parallel: attention and MLP read the same residual.
    experts: None where no layer has any.
    unserved: what of a configuration is not served, and why; None where all is.
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
