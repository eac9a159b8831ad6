"""The table of served families: how each differs from Llama, and which of its features are not served."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from service.errors import UnsupportedModel
from service.models.family import ExpertShape, Family, Names
from service.models.fields import count
from service.models.refusals import gemma3_unserved, gpt2_unserved, opt_unserved

GEMMA_NAMES = Names(
    post_attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def qwen3_experts(config: PreTrainedConfig) -> ExpertShape:
    """Experts in every decoder_sparse_step-th layer, except those in mlp_only_layers."""
    every, dense = count(config, "decoder_sparse_step"), config.mlp_only_layers or []
    layers = frozenset(i for i in range(config.num_hidden_layers) if (i + 1) % every == 0 and i not in dense)
    num_experts, per_token = count(config, "num_experts"), count(config, "num_experts_per_tok")
    if per_token > num_experts:
        raise UnsupportedModel(f"num_experts_per_tok {per_token} exceeds num_experts {num_experts}")
    return ExpertShape(
        num_experts,
        per_token,
        count(config, "moe_intermediate_size"),
        is_renormalized=config.norm_topk_prob,
        layers=layers,
    )


FAMILIES = {
    "llama": Family(
        qkv_bias=lambda c: c.attention_bias, o_bias=lambda c: c.attention_bias, mlp_bias=lambda c: c.mlp_bias
    ),
    "mistral": Family(has_window=True),
    "qwen2": Family(qkv_bias=lambda _: True, has_window=True),
    "qwen3": Family(
        names=Names(head_norms=HEAD_NORMS),
        has_window=True,
        qkv_bias=lambda c: c.attention_bias,
        o_bias=lambda c: c.attention_bias,
    ),
    "qwen3_moe": Family(
        names=Names(head_norms=HEAD_NORMS),
        has_window=True,
        qkv_bias=lambda c: c.attention_bias,
        o_bias=lambda c: c.attention_bias,
        experts=qwen3_experts,
    ),
    "gemma2": Family(
        names=GEMMA_NAMES,
        norm_offset=1.0,
        has_window=True,
        has_scaled_embedding=True,
        qkv_bias=lambda c: c.attention_bias,
        o_bias=lambda c: c.attention_bias,
    ),
    "gemma3_text": Family(
        names=replace(GEMMA_NAMES, head_norms=HEAD_NORMS),
        norm_offset=1.0,
        has_window=True,
        has_scaled_embedding=True,
        qkv_bias=lambda c: c.attention_bias,
        o_bias=lambda c: c.attention_bias,
        unserved=gemma3_unserved,
    ),
    "phi3": Family(
        names=Names(qkv=("self_attn.qkv_proj",), up=("gate_up_proj",)), has_window=True, has_partial_rope=True
    ),
    "opt": Family(
        names=Names(
            embedding="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            layers="model.decoder.layers",
            norm="model.decoder.final_layer_norm",
            attention_norm="self_attn_layer_norm",
            o="self_attn.out_proj",
            mlp_norm="final_layer_norm",
            mlp="",
            up=("fc1",),
            down="fc2",
        ),
        norm="layer",
        is_gated=False,
        position_offset=2,
        qkv_bias=lambda c: c.enable_bias,
        o_bias=lambda c: c.enable_bias,
        mlp_bias=lambda c: c.enable_bias,
        unserved=opt_unserved,
    ),
    "gpt2": Family(
        names=Names(
            embedding="transformer.wte",
            positions="transformer.wpe",
            layers="transformer.h",
            norm="transformer.ln_f",
            attention_norm="ln_1",
            qkv=("attn.c_attn",),
            o="attn.c_proj",
            mlp_norm="ln_2",
            up=("c_fc",),
            down="c_proj",
        ),
        norm="layer",
        is_gated=False,
        is_transposed=True,
        qkv_bias=lambda _: True,
        o_bias=lambda _: True,
        mlp_bias=lambda _: True,
        unserved=gpt2_unserved,
    ),
    "gpt_neox": Family(
        names=Names(
            embedding="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            norm="gpt_neox.final_layer_norm",
            head="embed_out",
            qkv=("attention.query_key_value",),
            o="attention.dense",
            up=("dense_h_to_4h",),
            down="dense_4h_to_h",
        ),
        norm="layer",
        is_gated=False,
        has_head_major_qkv=True,
        has_partial_rope=True,
        qkv_bias=lambda c: c.attention_bias,
        o_bias=lambda c: c.attention_bias,
        mlp_bias=lambda _: True,
        is_parallel=lambda c: c.use_parallel_residual,
    ),
}
