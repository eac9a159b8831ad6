"""A model's configuration, read from its config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from quant.checkpoint.model_config import read_config
from quant.convert.rotate import Stream
from quant.convert.smoothquant import SmoothGroup
from quant.errors import CheckpointError
from service.errors import UnsupportedModel
from service.models.families import FAMILIES
from service.models.family import ExpertShape, Family
from service.models.fields import checked_count, count, number, own_value
from service.models.positions import max_positions, refuse_rope, rope_parameters, rope_tables
from service.models.refusals import Activation, activation_of, refuse_head_size, windows_of
from service.models.smoothing import layer_downs, layer_groups, layer_linears


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's configuration, as the decoder uses it.

    scale: multiplies q k^T.   soft_cap, logit_cap: bounds of the scores and of the logits, or None.
    windows: for each layer, the number of keys that a token attends to, or None for all.
    experts: None if no layer has any.
    num_positions: positions that the model was made for.
    rope: [max_model_len, R] float32, cosines then sines by position; R is 0 for learned positions.
    local_rope: the same for layers with a window if their angles differ, else None.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    norm_eps: float
    activation: Activation
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    is_parallel: bool
    is_tied: bool
    scale: float
    soft_cap: float | None
    logit_cap: float | None
    windows: tuple[int | None, ...]
    experts: ExpertShape | None
    num_positions: int
    max_model_len: int
    dtype: torch.dtype
    rope: Tensor = field(repr=False, compare=False)
    local_rope: Tensor | None = field(repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path, max_model_len: int | None = None, num_more: int = 0) -> ModelConfig:
        """Read config.json of a model folder.

        Args:
            folder: contains config.json.
            max_model_len: positions to serve; None for as many as the model was made for, at most 8192.
            num_more: positions beyond those, as far as the model was made for them.

        Raises:
            UnsupportedModel: there is no config.json, or the family or one of its features is not served.
        """
        try:
            config = read_config(folder)
        except CheckpointError as error:
            raise UnsupportedModel(str(error)) from error
        try:
            return cls.of(config, max_model_len, num_more)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{folder}/config.json: {error.message}") from error

    @classmethod
    def of(cls, config: PreTrainedConfig, max_model_len: int | None = None, num_more: int = 0) -> ModelConfig:
        """Convert a Hugging Face configuration. Raises UnsupportedModel as `load`."""
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise UnsupportedModel(
                f"model family {config.model_type!r} is not served; the families are {', '.join(FAMILIES)}"
            )
        hidden_size, num_heads = count(config, "hidden_size"), count(config, "num_attention_heads")
        # transformers' models read it even where their configurations do not declare it.
        head_size = checked_count("head_dim", getattr(config, "head_dim", None) or hidden_size // num_heads)
        refuse_head_size(head_size)
        for parameters in rope_parameters(config).values():
            refuse_rope(parameters, family.has_partial_rope, head_size)
        reason = family.unserved(config)
        if reason is not None:
            raise UnsupportedModel(reason)
        length = _served_len(config, max_model_len, num_more)
        rope, local_rope = rope_tables(config, head_size, length)
        return cls(
            family=config.model_type,
            num_layers=count(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=_intermediate_size(config, hidden_size),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(config, num_heads),
            head_size=head_size,
            vocab_size=count(config, "vocab_size"),
            norm_eps=number(config, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") or 1e-5,
            activation=activation_of(config, family.is_gated),
            qkv_bias=family.qkv_bias(config),
            o_bias=family.o_bias(config),
            mlp_bias=family.mlp_bias(config),
            is_parallel=family.is_parallel(config),
            is_tied=config.tie_word_embeddings,
            scale=(number(config, "query_pre_attn_scalar") or head_size) ** -0.5,
            soft_cap=number(config, "attn_logit_softcapping"),
            logit_cap=number(config, "final_logit_softcapping"),
            windows=windows_of(config) if family.has_window else (None,) * config.num_hidden_layers,
            experts=family.experts(config),
            num_positions=count(config, "max_position_embeddings"),
            max_model_len=length,
            dtype=config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16,
            rope=rope,
            local_rope=local_rope,
        )

    @property
    def layout(self) -> Family:
        """The entry of its family in `FAMILIES`."""
        return FAMILIES[self.family]

    @property
    def cache_elements_per_token(self) -> int:
        """Key and value elements of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size

    def num_experts(self, index: int) -> int:
        """Number of experts of a layer; 0 if it has one MLP for all tokens."""
        return self.experts.count if self.experts is not None and index in self.experts.layers else 0


def linear_names(config: ModelConfig) -> list[str]:
    """The Linears that a scheme quantizes: all except the head and routers."""
    layers = range(config.num_layers)
    return [name for i in layers for name in layer_linears(config.layout, i, config.num_experts(i))]


def down_names(config: ModelConfig) -> frozenset[str]:
    """Those of `linear_names` that are the last Linear of an MLP."""
    layers = range(config.num_layers)
    return frozenset(name for i in layers for name in layer_downs(config.layout, i, config.num_experts(i)))


def qkv_names(config: ModelConfig) -> list[tuple[str, ...]]:
    """Of each layer, the Linears that queries, keys and values come from: one, or three in that order."""
    names = config.layout.names
    return [tuple(f"{names.layer(i)}.{name}" for name in names.qkv) for i in range(config.num_layers)]


def stream_of(config: ModelConfig) -> Stream:
    """The modules around the residual stream, which a rotation changes.

    Raises:
        UnsupportedModel: a rotation would change the function: a LayerNorm subtracts a mean, and a norm of a branch's
            output weighs channels.
    """
    names, family = config.layout.names, config.layout
    if family.norm != "rms" or names.post_attention_norm is not None:
        what = "LayerNorms" if family.norm != "rms" else "norms behind its branches"
        raise UnsupportedModel(f"{config.family} has {what}, through which no rotation passes: leave rotate off")
    readers, writers, values, outputs = dict[str, str](), set[str](), dict[str, int](), set[str]()
    for index in range(config.num_layers):
        layer = names.layer(index)
        num_experts = config.num_experts(index)
        mlps = names.mlps(index, num_experts)
        up = [f"{mlp}{part}" for mlp in mlps for part in names.up] + ([names.router(index)] if num_experts else [])
        readers |= dict.fromkeys((f"{layer}.{part}" for part in names.qkv), f"{layer}.{names.attention_norm}")
        readers |= dict.fromkeys(up, f"{layer}.{names.mlp_norm}")
        writers |= {f"{layer}.{names.o}", *(f"{mlp}{names.down}" for mlp in mlps)}
        num_before = config.num_heads + config.num_kv_heads if len(names.qkv) == 1 else 0
        values[f"{layer}.{names.qkv[-1]}"] = num_before * config.head_size
        outputs.add(f"{layer}.{names.o}")
    return Stream(
        names.embedding,
        names.norm,
        names.head,
        readers,
        frozenset(writers),
        values,
        frozenset(outputs),
        config.head_size,
        family.norm_offset,
    )


def smooth_groups(config: ModelConfig) -> list[SmoothGroup]:
    """The groups into which smoothing can be folded exactly; see `layer_groups`."""
    is_up_linear = config.layout.is_gated or config.activation == "relu"
    return [
        group
        for index in range(config.num_layers)
        for group in layer_groups(
            config.layout,
            index,
            num_experts=config.num_experts(index),
            is_up_linear=is_up_linear,
            num_copies=config.num_heads // config.num_kv_heads,
            head_size=config.head_size,
        )
    ]


def _served_len(config: PreTrainedConfig, max_model_len: int | None, num_more: int) -> int:
    limit = max_positions(config)
    if max_model_len is not None and max_model_len > limit:
        raise UnsupportedModel(f"max_model_len {max_model_len} exceeds the {limit} positions this model was made for")
    return min(limit, (max_model_len or min(limit, 8192)) + num_more)


def _intermediate_size(config: PreTrainedConfig, hidden_size: int) -> int:
    keys = "ffn_dim", "n_inner", "intermediate_size"
    return 4 * hidden_size if own_value(config, *keys)[1] is None else count(config, *keys)


def _num_kv_heads(config: PreTrainedConfig, num_heads: int) -> int:
    found = count(config, "num_key_value_heads", "num_attention_heads")
    if num_heads % found:
        raise UnsupportedModel(f"num_key_value_heads {found} does not divide num_attention_heads {num_heads}")
    return found
