"""Shapes of well-known models, for runs without their weights: speed does not depend on the values."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config

LLAMA_3_1: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "dtype": "float16",
}
"""What the sizes of Llama 3.1 have in common."""

SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3.1-8b": LlamaConfig(
        **LLAMA_3_1, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
    "llama-3.1-70b": LlamaConfig(
        **LLAMA_3_1, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
        dtype="float16",
    ),
    "llama-2-13b": LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        dtype="float16",
    ),
    "opt-6.7b": OPTConfig(
        vocab_size=50272,
        hidden_size=4096,
        ffn_dim=16384,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        word_embed_proj_dim=4096,
        dtype="float16",
    ),
    "tiny": LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        dtype="float16",
    ),
}


def linear_sizes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of a decoder layer's Linears as they run: q, k, v as one, gate and up as one; OPT has fc1 and fc2."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes = {"qkv": ((heads + 2 * kv_heads) * head_size, hidden), "o": (hidden, heads * head_size)}
    if config.model_type == "opt":
        return sizes | {"fc1": (config.ffn_dim, hidden), "fc2": (hidden, config.ffn_dim)}
    inner = config.intermediate_size
    return sizes | {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
