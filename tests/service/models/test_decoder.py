"""The decoder of every family against Hugging Face's own code on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

import kernels
from kernels import Quantized
from kernels.cpu import ops
from quant.errors import CheckpointError
from quant.linear import FloatLinear, Int8Linear
from quant.scheme import PRESETS, KVStorage, Scheme
from service.errors import UnsupportedModel
from service.models.config import ModelConfig
from service.models.decoder import Decoder, score
from service.models.loader import load_decoder
from service.models.random_weights import RandomWeights, random_decoder
from tests.service.kinds import Tiny
from tests.support.tiny_models import SHAPE, change_tensors, in_chunks, save_tiny_model

BOTH: tuple[KVStorage, KVStorage] = ("float", "int8")
ChangeHeads = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(heads [n, D], codes, scale [n]) -> heads."""

CPU = torch.device("cpu")


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SHAPE, **changes})


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    error: float = ((found - expected).norm() / expected.norm()).item()
    return error


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_an_embedding_that_overflows_where_it_is_scaled_is_refused(tmp_path: Path, value: float) -> None:
    """Found by fuzzing: one token's row is finite, and infinite times the root of the width."""
    name = "model.embed_tokens.weight"
    for family in ("gemma2", "llama"):
        folder = save_tiny_model(tmp_path / family, family)
        rows = load_file(folder / "model.safetensors")[name]
        rows[112, 3] = value
        change_tensors(folder, {name: rows})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight reaches 3e\+38: times 13.8"):
        load_decoder(tmp_path / "gemma2", torch.float32, CPU)
    # A family that does not scale it serves it: the first norm makes it small.
    assert load_decoder(tmp_path / "llama", torch.float32, CPU).embedding_scale is None


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2"])
def test_a_dropped_tensor_is_noticed(tiny: Tiny, name: str) -> None:
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


def test_a_norm_feeds_int8_to_an_int8_linear_and_float_to_a_float_one() -> None:
    config = ModelConfig.of(llama())
    for scheme_name, is_quantized in (
        ("w8a8", True),
        ("smoothquant-o3", True),
        ("smoothquant-o2", False),
        ("fp16", False),
    ):
        decoder = random_decoder(config, PRESETS[scheme_name], torch.float32, CPU)
        y, _ = decoder.layers[0].attention_norm(torch.randn(3, config.hidden_size), None)
        assert isinstance(y, Quantized) == is_quantized, scheme_name


def test_only_what_is_found_for_a_whole_step_ties_rows_together() -> None:
    """A dynamic scale per tensor, and the outlier columns."""
    config = ModelConfig.of(llama())
    independent = {
        name: random_decoder(config, scheme, torch.float32, CPU).is_row_independent for name, scheme in PRESETS.items()
    }
    tied = {name for name, is_independent in independent.items() if not is_independent}
    assert tied == {"rtn-dynamic", "smoothquant-o2", "llm-int8"}


def test_random_weights_quantize_every_linear_but_the_head() -> None:
    config = ModelConfig.of(llama(tie_word_embeddings=False))
    decoder = Decoder(config, RandomWeights(PRESETS["w8a8"], config, torch.float32, CPU))
    assert all(isinstance(linear, Int8Linear) for layer in decoder.layers for linear in layer.linears)
    assert not isinstance(decoder.head, Int8Linear)
    assert score(decoder, torch.arange(9)).isfinite().all()


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_int8_head(is_tied: bool) -> None:
    """Its logits are those of the rounded weights and rows, the embedding stays as it is, and both are counted."""
    config = ModelConfig.of(llama(tie_word_embeddings=is_tied))
    schemes = [PRESETS["w8a8"], PRESETS["w8a8"].with_head("int8")]
    floating, int8 = (random_decoder(config, scheme, torch.float32, CPU) for scheme in schemes)
    head, weight = int8.head, floating.head.weight if isinstance(floating.head, FloatLinear) else None
    assert isinstance(head, Int8Linear)
    assert weight is not None
    assert (head.weight_q * head.weight_scale[:, None] - weight).abs().max() <= head.weight_scale.max() * 0.5001
    assert torch.equal(int8.embedding, floating.embedding)
    hidden = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = kernels.quantize_rows(hidden)
    expected = (rows.codes.double() * rows.scale.double()[:, None]) @ (
        head.weight_q.double() * head.weight_scale.double()[:, None]
    ).T
    assert (int8.logits(hidden) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert 0 < (int8.logits(hidden) - floating.logits(hidden)).norm() < 0.03 * floating.logits(hidden).norm()
    assert int8.weight_bytes - floating.weight_bytes == head.weight_bytes - (0 if is_tied else weight.nbytes)


IDS = torch.randint(3, 256, (100,), generator=torch.Generator().manual_seed(5))


def twins(name: str, tiny: Tiny, scheme: Scheme | None = None) -> tuple[Decoder, Decoder]:
    """A decoder with float and one with int8 keys and values, of the same weights: a float model's, or random ones."""
    model, folder = tiny(name)
    if scheme is None:
        return load_decoder(folder, torch.float32, CPU), load_decoder(folder, torch.float32, CPU, kv="int8")
    config = ModelConfig.of(model.config)
    floating, int8 = (random_decoder(config, scheme.with_kv(kv), torch.float32, CPU) for kv in BOTH)
    return floating, int8


@pytest.fixture
def change_heads(monkeypatch: pytest.MonkeyPatch) -> Callable[[ChangeHeads], None]:
    """Lets a function (heads [n, D], codes, scale [n]) -> heads change what a step wrote into its float caches.

    Queries are rounded as well, each head by itself, as they are over int8 keys.
    """
    rope_and_cache = ops.rope_and_cache

    def use(change: ChangeHeads) -> None:
        def changed(
            qkv: Tensor,
            positions: Tensor,
            slots: Tensor,
            cos_sin: Tensor,
            k_cache: Tensor,
            v_cache: Tensor,
            *others: Any,
        ) -> Tensor:
            q = rope_and_cache(qkv, positions, slots, cos_sin, k_cache, v_cache, *others)
            for cache in (k_cache, v_cache):
                heads = cache.flatten(0, 2)
                cache.copy_(change(heads, *kernels.quantize_rows(heads)).view_as(cache))
            codes, scale = kernels.quantize_rows(q.flatten(0, 1))
            return (codes * scale[:, None]).view_as(q)

        monkeypatch.setattr(ops, "rope_and_cache", changed)

    return use


@pytest.mark.parametrize("scheme", [None, PRESETS["w8a8"]], ids=["float", "w8a8"])
def test_an_int8_cache_is_a_float_one_whose_heads_were_rounded(
    tiny: Tiny, change_heads: Callable[[ChangeHeads], None], scheme: Scheme | None
) -> None:
    """Each head rounded by `quantize_rows` as it is written, and each query's as it is read: the same bits."""
    floating, int8 = twins("llama-3.1", tiny, scheme)
    with torch.inference_mode():
        found = score(int8, IDS)
        assert not torch.equal(score(floating, IDS), found)
        change_heads(lambda _, codes, scale: codes * scale[:, None])
        assert torch.equal(score(floating, IDS), found)


@pytest.mark.parametrize("name", ["llama", "llama-3.1", "llama-wide-heads", "qwen2"])
def test_int8_keys_and_values_are_near_float_ones(
    tiny: Tiny, change_heads: Callable[[ChangeHeads], None], name: str
) -> None:
    """As near as rounding allows: what noise, uniform in half a code either way, does to float keys and values, beside
    rounded queries.

    That noise has the mean square of a rounding error. Twice either way, for one draw of it.
    """
    floating, int8 = twins(name, tiny)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        exact, found = score(floating, IDS), score(int8, IDS)
        change_heads(
            lambda heads, _, scale: heads + (torch.rand(heads.shape, generator=generator) - 0.5) * scale[:, None]
        )
        allowed = relative_error(score(floating, IDS), exact)
    assert allowed / 2 < relative_error(found, exact) < min(2 * allowed, 0.1)


@pytest.mark.parametrize("name", ["llama", "llama-3.1", "qwen2"])
@pytest.mark.parametrize("scheme", [None, PRESETS["w8a8"]], ids=["float", "w8a8"])
def test_decoding_gives_the_logits_of_one_prefill(tiny: Tiny, name: str, scheme: Scheme | None) -> None:
    """A token reads what it and those before it wrote, in one step or in many: 9 tokens at once, then one by one.

    With float keys and values the two differ by the order of float32 sums. With int8 ones such a difference may turn a
    code on a tie, which moves one element of a head by a code: of a head of 64 that is 0.4 of what rounding moved it,
    and few heads have a tie. So they differ by less than half of what rounding did.
    """
    floating, int8 = twins(name, tiny, scheme)
    with torch.inference_mode():
        expected = score(int8, IDS)
        rounding = relative_error(expected, score(floating, IDS))
        assert relative_error(in_chunks(int8, IDS, [9] + [1] * 91), expected) < rounding / 2 < 0.05
        if scheme is None:
            assert relative_error(in_chunks(floating, IDS, [9] + [1] * 91), score(floating, IDS)) < 2e-5


@pytest.mark.parametrize("name", ["llama", "llama-3.1", "llama-wide-heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_takes_the_bytes_that_its_caches_have(tiny: Tiny, name: str, dtype: torch.dtype) -> None:
    config = ModelConfig.of(tiny(name)[0].config)
    heads = 2 * config.num_layers * config.num_kv_heads
    # On the CPU a float cache is float32 whatever the model's dtype; int8 adds 4 bytes of scale to a head.
    for kv, bytes_per_head in zip(BOTH, (4 * config.head_size, config.head_size + 4), strict=True):
        decoder = random_decoder(config, PRESETS["w8a8"].with_kv(kv), dtype, CPU)
        assert decoder.kv_bytes_per_token == heads * bytes_per_head
        caches = decoder.new_caches(num_blocks=3, block_size=16)
        assert sum(cache.nbytes for cache in caches) == 3 * 16 * decoder.kv_bytes_per_token
        assert all(isinstance(part, Quantized) == (kv == "int8") for cache in caches for part in (cache.k, cache.v))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"head_dim": 40}, "head size 40"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_a_feature_that_is_not_served_is_refused_by_name(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModel, match=complaint):
        ModelConfig.of(llama(**changes))


def test_a_family_that_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 30}))
    with pytest.raises(UnsupportedModel, match="'bert' is not served; the families are llama"):
        ModelConfig.load(tmp_path)


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="max_model_len 257 exceeds the 256"):
        ModelConfig.of(llama(), max_model_len=257)
