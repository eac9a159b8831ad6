"""A tiny Llama with its calibration tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quant.convert.layer import Recipe
from quant.convert.model import quantize_checkpoint
from quant.convert.smoothquant import SmoothGroup
from quant.scheme import Scheme
from tests.support.modules import evaluated, in_float32

NUM_LAYERS, HIDDEN, FFN, VOCAB = 2, 64, 96, 128


@dataclass(frozen=True)
class Tiny:
    """One float model on disk and all that quantize_checkpoint takes."""

    model: LlamaForCausalLM
    folder: Path
    windows: Tensor
    groups: list[SmoothGroup]
    linear_names: list[str]

    def quantize(self, out: Path, scheme: Scheme, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        said = {name: changes.pop(name) for name in ("notes", "on_progress") if name in changes}
        fields: dict[str, Any] = {"groups": self.groups, "linear_names": self.linear_names, "windows": self.windows}
        quantize_checkpoint(self.folder, out, recipe(scheme=scheme, dtype=dtype, **(fields | changes)), **said)
        return out


def recipe(*, linear_names: Iterable[str] = (), groups: Iterable[SmoothGroup] = (), **fields: Any) -> Recipe:
    """A recipe of these fields, names and groups in any order that a test has them."""
    linear_names = tuple(linear_names)
    down_names = frozenset(name for name in linear_names if name.endswith(".down_proj"))
    return Recipe(linear_names=linear_names, down_names=down_names, groups=tuple(groups), **fields)


def llama_groups(num_layers: int) -> list[SmoothGroup]:
    groups = []
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        qkv = tuple(f"{prefix}.self_attn.{part}_proj" for part in "qkv")
        gate_up = (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")
        groups += [
            SmoothGroup(f"{prefix}.input_layernorm", qkv),
            SmoothGroup(f"{prefix}.self_attn.v_proj", (f"{prefix}.self_attn.o_proj",), num_copies=2, head_size=16),
            SmoothGroup(f"{prefix}.post_attention_layernorm", gate_up),
            SmoothGroup(f"{prefix}.mlp.up_proj", (f"{prefix}.mlp.down_proj",)),
        ]
    return groups


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Random weights with outlier channels in the norms, so that smoothing has something to do."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    } | changes
    config = LlamaConfig(**fields)
    model = evaluated(in_float32(LlamaForCausalLM(config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                parameter[3] *= 20
    return model
