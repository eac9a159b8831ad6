"""Checks whether a configuration is served: activations, windows, head sizes, and features of each family."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedConfig

from service.errors import UnsupportedModel
from service.models.fields import checked_count, own_value, shown
from service.models.positions import GLOBAL, LOCAL

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

HEAD_SIZES = (64, 80, 96, 128, 256)
"""Head sizes that the attention kernels are tested for."""

GATED: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's name of a gated MLP's activation -> op."""

PLAIN: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""The same for MLPs that are not gated."""


def activation_of(config: PreTrainedConfig, is_gated: bool) -> Activation:
    """The activation of the MLP. Raises UnsupportedModel if it is not served."""
    served = GATED if is_gated else PLAIN
    key, name = own_value(config, "hidden_activation", "hidden_act", "activation_function")
    if not isinstance(name, str) or name not in served:
        raise UnsupportedModel(
            f"{key} {shown(name)} is not served for {config.model_type}; the functions are {', '.join(served)}"
        )
    return served[name]


def windows_of(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """For each layer, the number of keys that a token attends to, including its own, or None for all."""
    window = getattr(config, "sliding_window", None) or None
    if window is not None:
        checked_count("sliding_window", window)
    num_layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [LOCAL] * num_layers
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise UnsupportedModel(
            f"layer_types is {shown(kinds)}; a list of one for each of {num_layers} layers is served"
        )
    for kind in kinds:
        if kind not in (GLOBAL, LOCAL):
            raise UnsupportedModel(f"layer type {shown(kind)} is not served; the types are {GLOBAL}, {LOCAL}")
    return tuple(window if kind == LOCAL else None for kind in kinds)


def refuse_head_size(head_size: int) -> None:
    if head_size not in HEAD_SIZES:
        raise UnsupportedModel(f"head size {head_size} is not served; the sizes are {', '.join(map(str, HEAD_SIZES))}")


def gemma3_unserved(config: PreTrainedConfig) -> str | None:
    if config.use_bidirectional_attention:
        return "use_bidirectional_attention is not served: a token would see keys that are not computed yet"
    if config.attn_logit_softcapping is not None:
        return "attn_logit_softcapping is not served for gemma3_text, whose own code does not apply it; set it to null"
    return None


def opt_unserved(config: PreTrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return (
            "do_layer_norm_before = false (opt-350m) is not served: its norms follow the residual sum, which the "
            "fused norms here only read"
        )
    if config.word_embed_proj_dim != config.hidden_size:
        return (
            f"word_embed_proj_dim {config.word_embed_proj_dim} beside hidden_size {config.hidden_size} (opt-350m) is "
            "not served: embeddings would need projections of their own"
        )
    if config._remove_final_layer_norm:
        return "_remove_final_layer_norm is not served: the last norm also adds the last residual"
    if not config.layer_norm_elementwise_affine:
        return "layer_norm_elementwise_affine = false is not served: the norms here have weights"
    return None


def gpt2_unserved(config: PreTrainedConfig) -> str | None:
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "attention scaled otherwise than by 1 / sqrt(head size) in every layer is not served for gpt2"
    if config.add_cross_attention:
        return "add_cross_attention is not served: there is no encoder"
    return None
