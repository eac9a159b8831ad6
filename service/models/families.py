"""The families served, as one table. A family is a row: what differs from Llama, and what it cannot do here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quant.smooth import SmoothGroup
from service.errors import UnsupportedModel

HEAD_SIZES = (64, 80, 96, 128, 256)
"""Head sizes the attention kernels are tested for."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary types whose angles do not depend on the length of the request."""


@dataclass(frozen=True, slots=True)
class Family:
    """How a family's configuration maps onto the decoder.

    Each field answers from the Hugging Face configuration: whether the projections carry a bias.
    window: the number of past tokens a position sees, or None for all.
    """

    qkv_bias: Callable[[PreTrainedConfig], bool] = lambda _: False
    o_bias: Callable[[PreTrainedConfig], bool] = lambda _: False
    mlp_bias: Callable[[PreTrainedConfig], bool] = lambda _: False
    window: Callable[[PreTrainedConfig], int | None] = lambda _: None


FAMILIES = {
    "llama": Family(
        qkv_bias=lambda c: c.attention_bias, o_bias=lambda c: c.attention_bias, mlp_bias=lambda c: c.mlp_bias
    ),
    "mistral": Family(window=lambda c: c.sliding_window),
    "qwen2": Family(qkv_bias=lambda _: True, window=lambda c: c.sliding_window if c.use_sliding_window else None),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the decoder needs to know of a model. rope: [max_model_len, R] float32, cosines then sines by position."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    is_tied: bool
    max_model_len: int
    dtype: torch.dtype
    rope: Tensor = field(repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path, max_model_len: int | None = None) -> ModelConfig:
        """Read config.json of a model folder.

        Args:
            folder: holds config.json.
            max_model_len: positions to serve; None for as many as the model and its window admit, at most 8192.

        Raises:
            UnsupportedModel: no config.json, a family outside the table, or a feature of it that is not served.
        """
        if not (folder / "config.json").is_file():
            raise UnsupportedModel(f"{folder} is not a model folder: it has no config.json")
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            raise UnsupportedModel(f"{folder}/config.json cannot be read: {first_line(error)}") from error
        return cls.of(config, max_model_len)

    @classmethod
    def of(cls, config: PreTrainedConfig, max_model_len: int | None = None) -> ModelConfig:
        """Map a Hugging Face configuration; raises UnsupportedModel as `load` does."""
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise UnsupportedModel(
                f"model family {config.model_type!r} is not served; the families are {', '.join(FAMILIES)}"
            )
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        _refuse_unserved(config, head_size)
        limit = min(config.max_position_embeddings, family.window(config) or config.max_position_embeddings)
        if max_model_len is not None and max_model_len > limit:
            raise UnsupportedModel(
                f"max_model_len {max_model_len} exceeds the {limit} positions this model was made for"
            )
        length = max_model_len or min(limit, 8192)
        return cls(
            family=config.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_size=head_size,
            vocab_size=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            qkv_bias=family.qkv_bias(config),
            o_bias=family.o_bias(config),
            mlp_bias=family.mlp_bias(config),
            is_tied=config.tie_word_embeddings,
            max_model_len=length,
            dtype=config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16,
            rope=_rope_table(config, head_size, length),
        )

    @property
    def cache_elements_per_token(self) -> int:
        """Key and value elements that one token adds, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size


def linear_names(config: ModelConfig) -> list[str]:
    """The Linears that a scheme quantizes: all but the head."""
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    return [f"model.layers.{i}.{part}" for i in range(config.num_layers) for part in parts]


def smooth_groups(config: ModelConfig) -> list[SmoothGroup]:
    """Where a migration can be folded without a trace.

    The norms into the Linears they feed, and up into down, since silu(gate) * up is linear in up.
    """
    groups = []
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        qkv = tuple(f"{layer}.self_attn.{p}_proj" for p in "qkv")
        gate_up = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
        groups += [
            SmoothGroup(f"{layer}.input_layernorm", qkv),
            SmoothGroup(f"{layer}.post_attention_layernorm", gate_up),
            SmoothGroup(f"{layer}.mlp.up_proj", (f"{layer}.mlp.down_proj",)),
        ]
    return groups


def first_line(error: BaseException) -> str:
    """An exception told in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refuse_unserved(config: PreTrainedConfig, head_size: int) -> None:
    if head_size not in HEAD_SIZES:
        raise UnsupportedModel(f"head size {head_size} is not served; the sizes are {', '.join(map(str, HEAD_SIZES))}")
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"hidden_act {config.hidden_act!r} is not served for {config.model_type}; silu is")
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in STATIC_ROPE:
        raise UnsupportedModel(f"rope type {rope_type!r} is not served; the types are {', '.join(STATIC_ROPE)}")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("partial_rotary_factor other than 1 is not served for this family")


def _rope_table(config: PreTrainedConfig, head_size: int, length: int) -> Tensor:
    """cos and sin of position * frequency, [length, head_size] float32, times the type's attention factor."""
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
        frequencies, factor = torch.exp(-exponents * math.log(config.rope_parameters["rope_theta"])), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies.double())
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(factor).float()
