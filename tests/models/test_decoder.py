"""The decoder of every family against Hugging Face's own code on the same weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from kernels import Quantized
from quant.linear import Int8Linear
from quant.scheme import PRESETS
from service.errors import UnsupportedModel
from service.models.decoder import Decoder, score
from service.models.families import ModelConfig, linear_names, smooth_groups
from service.models.loader import RandomWeights, load_decoder, random_decoder
from tests.models.conftest import SHAPE, TINY, make_model

CPU = torch.device("cpu")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(tiny, name):
    model, folder = tiny(name)
    decoder = load_decoder(folder, torch.float32, CPU)
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
        found = score(decoder, ids)
    assert relative_error(found, expected) < 2e-5


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2"])
def test_a_dropped_tensor_is_noticed(tiny, name):
    """The comparison above would fail if any single norm or bias were ignored."""
    model, folder = tiny(name)
    decoder = load_decoder(folder, torch.float32, CPU)
    ids = torch.arange(40)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
        layer = decoder.layers[0]
        for owner in layer.linears:
            if owner.bias is not None:
                bias, owner.bias = owner.bias, None
                assert relative_error(score(decoder, ids), expected) > 1e-3
                owner.bias = bias
        layer.mlp_norm.weight = layer.mlp_norm.weight.clone().fill_(1.0)
        assert relative_error(score(decoder, ids), expected) > 1e-3


def test_a_norm_feeds_int8_to_an_int8_linear_and_float_to_a_float_one():
    config = ModelConfig.of(LlamaConfig(**SHAPE))
    for scheme_name, is_quantized in (
        ("w8a8", True),
        ("smoothquant-o3", True),
        ("smoothquant-o2", False),
        ("fp16", False),
    ):
        decoder = random_decoder(config, PRESETS[scheme_name], torch.float32, CPU)
        y, _ = decoder.layers[0].attention_norm(torch.randn(3, config.hidden_size), None)
        assert isinstance(y, Quantized) == is_quantized, scheme_name


def test_only_a_dynamic_tensor_scale_ties_rows_together():
    config = ModelConfig.of(LlamaConfig(**SHAPE))
    independent = {
        name: random_decoder(config, scheme, torch.float32, CPU).is_row_independent for name, scheme in PRESETS.items()
    }
    assert [name for name, is_independent in independent.items() if not is_independent] == ["smoothquant-o2"]


def test_random_weights_quantize_every_linear_but_the_head():
    config = ModelConfig.of(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    decoder = Decoder(config, RandomWeights(PRESETS["w8a8"], linear_names(config), torch.float32, CPU))
    assert all(isinstance(linear, Int8Linear) for layer in decoder.layers for linear in layer.linears)
    assert not isinstance(decoder.head, Int8Linear)
    assert score(decoder, torch.arange(9)).isfinite().all()


def test_smooth_groups_name_modules_of_the_model():
    model = make_model("llama")
    modules = dict(model.named_modules())
    config = ModelConfig.of(model.config)
    groups = smooth_groups(config)
    assert len(groups) == 3 * config.num_layers
    assert all(name in modules for group in groups for name in (group.source, *group.sinks))
    assert all(name in modules for name in linear_names(config))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"head_dim": 40}, "head size 40"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_a_feature_that_is_not_served_is_refused_by_name(changes, complaint):
    with pytest.raises(UnsupportedModel, match=complaint):
        ModelConfig.of(LlamaConfig(**(SHAPE | changes)))


def test_a_family_that_is_not_served_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 30}))
    with pytest.raises(UnsupportedModel, match="'bert' is not served; the families are llama"):
        ModelConfig.load(tmp_path)


def test_more_positions_than_the_model_has_are_refused():
    with pytest.raises(UnsupportedModel, match="max_model_len 257 exceeds the 256"):
        ModelConfig.of(LlamaConfig(**SHAPE), max_model_len=257)


def test_a_sliding_window_bounds_the_context():
    assert ModelConfig.of(make_model("mistral", sliding_window=100).config).max_model_len == 100
