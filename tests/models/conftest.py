"""Tiny random models of every family, made by Hugging Face's own code, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

TINY: dict[str, tuple[type, type, dict]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biased": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 3}),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "llama-wide-heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 128}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
}


def make_model(name: str, **changes: object) -> PreTrainedModel:
    model_class, config_class, own = TINY[name]
    torch.manual_seed(0)
    model = model_class(config_class(**(SHAPE | {"tie_word_embeddings": False} | own | changes))).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases are born as ones and zeros, which would hide a missing one
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """name -> (model, folder); each made once."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def get(name: str) -> tuple[PreTrainedModel, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = make_model(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return get
