"""Tiny random models of every family, made by Hugging Face's own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kernels import Rows
from service.models.decoder import Decoder
from tests.support.modules import evaluated, in_float32
from tests.support.tokenizers import byte_level_backend, save

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.02 * i for i in range(32)],
    "long_factor": [4.0 + 0.1 * i for i in range(32)],
    "original_max_position_embeddings": 128,
}


HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


WINDOW = {"sliding_window": 24}


EXPERTS = {"head_dim": 64, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


MULTI_HEAD = {"num_key_value_heads": ..., "tie_word_embeddings": False}
"""Of families whose configuration has no key heads; `...` leaves a value out."""


TINY: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biased": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 3}),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "llama-wide-heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 128}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralForCausalLM, MistralConfig, WINDOW),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "qwen2-window": (Qwen2ForCausalLM, Qwen2Config, WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 64, "attention_bias": True}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe-dense-layer": (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS | {"mlp_only_layers": [0]}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        # Caps that bite: tiny random models have small scores.
        WINDOW
        | {
            "head_dim": 64,
            "query_pre_attn_scalar": 100,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_text": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        WINDOW | {"head_dim": 64, "num_hidden_layers": 7, "tie_word_embeddings": True},
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "phi3-partial": (Phi3ForCausalLM, Phi3Config, WINDOW | {"rope_parameters": HALF_ROPE}),
    "phi3-longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        MULTI_HEAD | {"intermediate_size": ..., "ffn_dim": 160, "word_embed_proj_dim": 192, "init_std": 0.15},
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config, MULTI_HEAD | {"intermediate_size": ..., "n_inner": 160}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, MULTI_HEAD),
    "gpt_neox-sequential": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        MULTI_HEAD | {"use_parallel_residual": False, "rope_parameters": HALF_ROPE, "attention_bias": False},
    ),
}


def make_config(name: str, **changes: object) -> PreTrainedConfig:
    _, config_class, own = TINY[name]
    settings = SHAPE | {"tie_word_embeddings": False} | own | changes
    config = config_class(**{key: value for key, value in settings.items() if value is not ...})
    # Eager: of the attentions transformers has, the one that applies a soft cap.
    config._attn_implementation = "eager"
    return config


def make_model(name: str, **changes: object) -> PreTrainedModel:
    config = make_config(name, **changes)
    torch.manual_seed(0)
    model = evaluated(in_float32(TINY[name][0](config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases are born as ones and zeros, which would hide a missing one
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def in_chunks(decoder: Decoder, ids: Tensor, sizes: list[int], block_size: int = 16) -> Tensor:
    """Logits of every token, so many in each step, in blocks out of order."""
    num_blocks = -(-len(ids) // block_size) + 1
    caches = decoder.new_caches(num_blocks, block_size)
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).to(torch.int32)[None]
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return torch.cat(
        [
            decoder.logits(decoder(ids[stop - size : stop], rows_of(stop - size, stop, table, block_size), caches))
            for size, stop in zip(sizes, stops, strict=True)
        ]
    )


def rows_of(start: int, stop: int, table: Tensor, block_size: int = 16) -> Rows:
    """One request's tokens start .. stop - 1."""
    positions = torch.arange(start, stop, dtype=torch.int32)
    return Rows(
        positions=positions,
        slots=table[0, positions // block_size] * block_size + positions % block_size,
        query_starts=torch.tensor([0, stop - start], dtype=torch.int32),
        context_lens=torch.tensor([stop], dtype=torch.int32),
        block_tables=table,
        is_decode=stop - start == 1,
    )


def save_tiny_model(folder: Path, name: str = "llama", **changes: object) -> Path:
    """A tiny random model of 340 tokens with a byte-level tokenizer, as `ottava` is given one."""
    make_model(name, **({"vocab_size": 340} | changes)).save_pretrained(folder)
    return save(folder, byte_level_backend())


def change_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> Path:
    """Replace tensors of a folder's one weights file, or drop those given as None."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
