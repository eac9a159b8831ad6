"""Random weights of every scheme: the Linears that a checkpoint of it would give, and finite logits."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from quant.linear import Int8Linear
from quant.scheme import PRESETS
from service.models.config import ModelConfig
from service.models.decoder import score
from service.models.random_weights import random_decoder

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=192,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=1,
)


@pytest.mark.parametrize("name", PRESETS)
def test_linears_are_of_the_scheme(name: str) -> None:
    scheme = PRESETS[name]
    decoder = random_decoder(ModelConfig.of(CONFIG), scheme, torch.float32, torch.device("cpu"))
    linears = [linear for layer in decoder.layers for linear in layer.linears]
    assert all(isinstance(linear, Int8Linear) == scheme.is_int8 for linear in linears)
    int8s = [linear for linear in linears if isinstance(linear, Int8Linear)]
    assert all(linear.input_codes.outliers == scheme.outliers for linear in int8s)
    # 192 is no multiple of 128, so that groups of it are halved; 256 is.
    groups = {linear.shape[1] // linear.weight_scale.shape[1] for linear in int8s if linear.weight_scale.ndim == 2}
    assert groups == ({64, 128} if scheme.weight == "group" else set())
    assert decoder.is_row_independent == (scheme.activation != "tensor" and scheme.outliers is None)
    assert score(decoder, torch.arange(9)).isfinite().all()
