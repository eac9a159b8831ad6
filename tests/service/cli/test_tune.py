"""Which products `ottava tune` measures: those of the decoder, of a whole one and of a rank's part."""

from __future__ import annotations

import pytest
import torch

from quant.scheme import PRESETS
from service.cli.tune import linear_shapes
from service.errors import UnsupportedModel
from service.models.config import ModelConfig
from service.models.random_weights import random_decoder
from service.models.sharding import Alone
from tests.support.tiny_models import make_model


class Half(Alone):
    """The first of two ranks, which only loads."""

    size = 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt"])
def test_shapes_are_those_of_the_decoder(family: str) -> None:
    heads = {"num_attention_heads": 4, "hidden_size": 256} | (
        {"word_embed_proj_dim": 256} if family == "opt" else {"num_key_value_heads": 2}
    )
    config = ModelConfig.of(make_model(family, **heads).config)
    for ranks, size in ((Alone(), 1), (Half(), 2)):
        decoder = random_decoder(config, PRESETS["w8a8"], torch.float32, torch.device("cpu"), ranks=ranks)
        shapes = linear_shapes(config, size)
        assert [(shape.n, shape.k) for shape in shapes] == [linear.shape for linear in decoder.layers[0].linears]
        assert [shape.is_gated for shape in shapes] == [False, False, family in {"llama", "qwen2"}, False]


def test_a_model_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="tensor_parallel 3 does not divide"):
        linear_shapes(ModelConfig.of(make_model("llama").config), 3)
