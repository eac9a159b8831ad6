"""Every family against Hugging Face's own code on the same weights; what it quantizes, folds and refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, PreTrainedConfig

from kernels import quantize_rows
from quant.checkpoint.reader import Checkpoint
from quant.convert.layer import Recipe
from quant.convert.model import quantize_checkpoint
from quant.convert.smoothquant import SmoothGroup, divide
from quant.errors import CheckpointError
from quant.linear import FloatLinear, InputCodes, Int8Linear
from quant.part import WHOLE, Part, taken
from quant.scheme import PRESETS
from service.errors import UnsupportedModel
from service.models.config import ModelConfig, down_names, linear_names, smooth_groups
from service.models.decoder import Decoder, score
from service.models.families import FAMILIES
from service.models.loader import load_decoder
from service.models.mlp import Experts
from service.models.random_weights import random_decoder
from service.models.weights import Linear
from tests.service.kinds import Tiny
from tests.support.narrowed import present
from tests.support.tiny_models import (
    HALF_ROPE,
    SHAPE,
    TINY,
    change_tensors,
    in_chunks,
    make_config,
    make_model,
    save_tiny_model,
)

CPU = torch.device("cpu")
IDS = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(3))
ULP = 2.0**-24
"""Half the distance of float32 values about 1: what one operation is off by, relatively."""

ROUNDINGS = 64
"""More than a sum of 192 float32 products in any order adds to a norm, in random signs, over the deepest model here."""


def ids_of(config: ModelConfig) -> Tensor:
    return IDS[: config.max_model_len]


def allowed_error(config: ModelConfig) -> float:
    """transformers takes angles in float32, so that the last is off by half an ulp of its size; learned have none."""
    return ULP * (ROUNDINGS + (len(ids_of(config)) if config.rope.numel() else 0))


def relative_error(found: Tensor, expected: Tensor) -> float:
    error: float = ((found - expected).norm() / expected.norm()).item()
    return error


def test_every_family_is_tested() -> None:
    assert {name.split("-")[0] for name in TINY} == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(tiny: Tiny, name: str) -> None:
    """In one chunk, in several with lone tokens between, and token by token."""
    model, folder = tiny(name)
    decoder = load_decoder(folder, torch.float32, CPU)
    ids = ids_of(decoder.config)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
        assert relative_error(score(decoder, ids), expected) < allowed_error(decoder.config)
        for sizes in ([50, 1, 1, len(ids) - 53, 1], [len(ids) - 60] + [1] * 60):
            assert relative_error(in_chunks(decoder, ids, sizes), expected) < allowed_error(decoder.config)


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_counts(tiny: Tiny, name: str) -> None:
    """The comparison above would fail if any tensor of the checkpoint were not read, or read from the wrong layer."""
    model, folder = tiny(name)
    state = state_of(folder)
    config = ModelConfig.of(model.config)
    ids = ids_of(config)
    with torch.inference_mode():
        expected = score(Decoder(config, State(config, state)), ids)
        for key, tensor in state.items():
            # Of a key's bias only differences between heads' columns matter, and a softmax takes those away.
            if key.endswith("k_proj.bias") and not config.rope.numel():
                continue
            generator = torch.Generator().manual_seed(len(key))
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            changed = score(Decoder(config, State(config, state | {key: tensor + noise})), ids)
            assert relative_error(changed, expected) > 10 * allowed_error(config), key


class State:
    """Tensors in memory as a decoder's weights: float, or the Linears named in int8."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor], int8_names: tuple[str, ...] = ()) -> None:
        self.tensors = tensors
        self.int8_names = int8_names
        self.is_transposed = config.layout.is_transposed

    def tensor(self, name: str, shape: tuple[int, ...], part: Part = WHOLE) -> Tensor:
        assert self.tensors[name].shape == shape, name
        return taken(self.tensors[name], part)

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        has_bias: bool,
        *,
        is_transposed: bool = False,
        part: Part = WHOLE,
    ) -> Linear:
        assert part == WHOLE
        shape = (in_features, out_features) if is_transposed else (out_features, in_features)
        weight = self.tensor(f"{name}.weight", shape)
        weight = weight.t().contiguous() if is_transposed else weight
        bias = self.tensor(f"{name}.bias", (out_features,)) if has_bias else None
        if name not in self.int8_names:
            return FloatLinear(weight, bias)
        rows = quantize_rows(weight)
        return Int8Linear(rows.codes, rows.scale, input_codes=InputCodes("token"), out_dtype=torch.float32, bias=bias)

    def differs(self, name: str, other: str) -> bool:
        return name in self.tensors and not torch.equal(self.tensors[name], self.tensors[other])


def state_of(folder: Path) -> dict[str, Tensor]:
    files = Checkpoint.open(folder, torch.float32, CPU).files
    return {name: files.get(name).float() for name in files.names}


@pytest.mark.parametrize("name", TINY)
def test_linears_in_int8(tiny: Tiny, name: str) -> None:
    """Of the named Linears all, and no other but the head and routers is left.

    The logits are as near as rounding allows. Noise in the weights, uniform in half a code either way, has the mean
    square of their rounding; the inputs are rounded too, which is about as much again: sqrt(2) of what one draw of that
    noise does. Twice either way.
    """
    _, folder = tiny(name)
    floating = load_decoder(folder, torch.float32, CPU)
    config, ids = floating.config, ids_of(floating.config)
    state, names = state_of(folder), linear_names(config)
    decoder = Decoder(config, State(config, state, tuple(names)))
    noisy = Decoder(config, State(config, state | {f"{x}.weight": with_noise(config, state, x) for x in names}))
    floats = [x for layer in decoder.layers for x in layer.linears if not isinstance(x, Int8Linear)]
    assert floats == [layer.mlp.router for layer in decoder.layers if isinstance(layer.mlp, Experts)]
    with torch.inference_mode():
        expected = score(floating, ids)
        allowed = 2**0.5 * relative_error(score(noisy, ids), expected)
        assert allowed / 2 < relative_error(score(decoder, ids), expected) < 2 * allowed < 0.3


def with_noise(config: ModelConfig, state: dict[str, Tensor], name: str) -> Tensor:
    weight = as_rows(config, state)[f"{name}.weight"]
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))) - 0.5
    noisy = weight + noise * quantize_rows(weight).scale[:, None]
    return noisy.t() if config.layout.is_transposed else noisy


@pytest.mark.parametrize("name", TINY)
def test_an_int8_checkpoint_holds_the_named_linears(tiny: Tiny, name: str, tmp_path: Path) -> None:
    """Written and read again, the same bits as the tensors rounded in memory: no name and no orientation is lost."""
    _, folder = tiny(name)
    config = ModelConfig.load(folder)
    names = linear_names(config)
    scheme, groups = PRESETS["rtn-token"], tuple(smooth_groups(config))
    recipe = Recipe(scheme=scheme, linear_names=tuple(names), groups=groups, dtype=torch.float32)
    quantize_checkpoint(folder, tmp_path / "int8", recipe)
    ids = ids_of(config)
    with torch.inference_mode():
        expected = score(Decoder(config, State(config, state_of(folder), tuple(names))), ids)
        assert torch.equal(score(load_decoder(tmp_path / "int8", torch.float32, CPU), ids), expected)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("scheme", ["w8a8", "smoothquant-o3"])
def test_random_weights_of_every_family(tiny: Tiny, name: str, scheme: str) -> None:
    config = ModelConfig.of(tiny(name)[0].config)
    decoder = random_decoder(config, PRESETS[scheme], torch.float32, CPU)
    assert score(decoder, torch.arange(9)).isfinite().all()
    assert decoder.can_be_captured == (config.experts is None)


def as_rows(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the Linears' weights [N, K] where they are stored transposed, and back."""
    names = {f"{name}.weight" for name in linear_names(config)} if config.layout.is_transposed else set()
    return {name: tensor.t() if name in names else tensor for name, tensor in tensors.items()}


def fold(config: ModelConfig, state: dict[str, Tensor], groups: list[SmoothGroup]) -> dict[str, Tensor]:
    """The state with a random s of 1/2 .. 2 folded into each group."""
    folded, generator = as_rows(config, state), torch.Generator().manual_seed(0)
    for group in groups:
        num_channels = folded[f"{group.source}.weight"].shape[0]
        divide(folded, group, (2 * torch.rand(num_channels, generator=generator) - 1).exp2())
    return as_rows(config, folded)


@pytest.mark.parametrize("name", TINY)
def test_folding_leaves_the_logits(tiny: Tiny, name: str) -> None:
    """And every sink named in a group reads its source: to leave one out changes them."""
    model, folder = tiny(name)
    config, state = ModelConfig.of(model.config), state_of(folder)
    ids, groups = ids_of(config), smooth_groups(config)

    def logits(tensors: dict[str, Tensor]) -> Tensor:
        return score(Decoder(config, State(config, tensors)), ids)

    with torch.inference_mode():
        expected = logits(state)
        assert relative_error(logits(fold(config, state, groups)), expected) < ULP * ROUNDINGS
        for group in groups[: len(groups) // config.num_layers]:
            for sink in group.sinks:
                folded = fold(config, state, [group])
                folded[f"{sink}.weight"] = state[f"{sink}.weight"]
                assert relative_error(logits(folded), expected) > 1e-4, (group.source, sink)


GROUPS = {
    "llama": 4,
    "qwen3": 4,
    "qwen3_moe": 3 + 5,
    "gemma2": 4,
    "gemma3_text": 4,
    "phi3": 2,
    "opt": 4,
    "gpt2": 2,
    "gpt_neox": 2,
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_a_layer(tiny: Tiny, name: str) -> None:
    """Norms always; v -> o where v has rows of its own; up -> down where the function between lets a factor through."""
    config = ModelConfig.of(tiny(name)[0].config)
    groups = smooth_groups(config)
    assert len(groups) == GROUPS[name] * config.num_layers
    sinks = [sink for group in groups for sink in group.sinks]
    routers = {f"model.layers.{i}.mlp.gate" for i in range(config.num_layers)} if config.experts else set()
    assert len(sinks) == len(set(sinks))
    assert set(sinks) <= set(linear_names(config)) | routers
    assert routers <= set(sinks)


def test_experts_do_not_depend_on_their_batch(tiny: Tiny) -> None:
    """A token's experts, their shares and the order of their sum are its own."""
    _, folder = tiny("qwen3_moe")
    mlp = load_decoder(folder, torch.float32, CPU).layers[0].mlp
    x = torch.randn(40, int(SHAPE["hidden_size"]), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = mlp(x)
        assert relative_error(torch.cat([mlp(row[None]) for row in x]), together) < ULP * ROUNDINGS
        assert torch.equal(mlp(x), together)


def test_experts_are_chosen_in_float(tiny: Tiny) -> None:
    _, folder = tiny("qwen3_moe")
    config = ModelConfig.load(folder)
    decoder = Decoder(config, State(config, state_of(folder), tuple(linear_names(config))))
    for layer in decoder.layers:
        assert isinstance(layer.mlp, Experts)
        assert isinstance(layer.mlp.router, FloatLinear)
    assert all(layer.mlp_norm.quantize is None for layer in decoder.layers)
    assert not decoder.can_be_captured


def test_gpt2_saved_without_its_head_is_found(tmp_path: Path) -> None:
    """As openai-community/gpt2 is: no tensor's name begins with the base model's."""
    model = make_model("gpt2", tie_word_embeddings=True)
    assert isinstance(model, GPT2LMHeadModel)
    model.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    decoder = load_decoder(tmp_path, torch.float32, CPU)
    with torch.inference_mode():
        expected = model(IDS[None]).logits[0]
        assert relative_error(score(decoder, IDS), expected) < allowed_error(decoder.config)


@pytest.mark.parametrize("name", TINY)
def test_a_head_of_its_own_is_used_whatever_the_configuration_says(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny_model(tmp_path / "model", name, tie_word_embeddings=False)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    decoder = load_decoder(folder, torch.float32, CPU)
    assert "of their own: it is used" in caplog.text
    assert not decoder.is_tied
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(ids_of(decoder.config)[None]).logits[0]
        assert relative_error(score(decoder, ids_of(decoder.config)), expected) < allowed_error(decoder.config)


@pytest.mark.parametrize("scheme", [name for name, scheme in PRESETS.items() if scheme.activation == "static"])
@pytest.mark.parametrize("name", TINY)
def test_readers_of_one_activation_have_one_static_scale(tiny: Tiny, tmp_path: Path, name: str, scheme: str) -> None:
    """In the file already: other readers load one of them over the others."""
    _, folder = tiny(name)
    config = ModelConfig.load(folder)
    windows = IDS.view(4, 50)[:, : config.max_model_len]
    quantize_checkpoint(
        folder,
        tmp_path / "out",
        Recipe(
            scheme=PRESETS[scheme],
            linear_names=tuple(linear_names(config)),
            down_names=down_names(config),
            groups=tuple(smooth_groups(config)),
            dtype=torch.float32,
            windows=windows,
        ),
    )
    checkpoint = Checkpoint.open(tmp_path / "out", torch.float32, CPU)
    files, names = checkpoint.files, config.layout.names
    assert checkpoint.schemes == (PRESETS[scheme],)
    for linear in linear_names(config):
        is_per_token = PRESETS[scheme].has_token_down and linear in down_names(config)
        assert (f"{linear}.input_scale" in files) != is_per_token
        read = present(present(checkpoint.quantization).format_of(linear))
        assert read.activation == ("token" if is_per_token else "static")
    for index in range(config.num_layers):
        groups = [[f"{names.layer(index)}.{part}" for part in names.qkv]]
        groups += [[mlp + part for part in names.up] for mlp in names.mlps(index, config.num_experts(index))]
        for group in groups:
            scales = {files.get(f"{linear}.input_scale").item() for linear in group}
            assert len(scales) == 1, group


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_is_used_or_named(tiny: Tiny, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A copy of the embedding as head and buffers of older code are listed; any other left-over is refused."""
    caplog.set_level("INFO")
    _, source = tiny(name)
    folder = shutil.copytree(source, tmp_path / "model")
    names = ModelConfig.load(folder).layout.names
    tensors = load_file(folder / "model.safetensors")
    head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
    harmless = {f"{names.layer(0)}.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    harmless |= {f"{names.layer(0)}.attn.bias": torch.ones(1, 1, 4, 4)}
    if head not in tensors:
        harmless[head] = tensors[embedding].clone()
    change_tensors(folder, dict(harmless))
    decoder = load_decoder(folder, torch.float32, CPU)
    assert decoder.is_tied == (head in harmless)
    assert all(each in caplog.text for each in harmless)
    for extra in (f"{names.layer(99)}.{names.o}.weight", f"{names.norm}.scale", f"{names.head}.bias", "v_head.weight"):
        change_tensors(folder, {extra: torch.ones(4)})
        with pytest.raises(CheckpointError, match=rf"{re.escape(extra)} would (be loaded and )?never (be )?used"):
            load_decoder(folder, torch.float32, CPU)
        change_tensors(folder, {extra: None})


def test_a_window_does_not_bound_the_context() -> None:
    config = ModelConfig.of(make_config("mistral", sliding_window=100))
    assert config.max_model_len == SHAPE["max_position_embeddings"]
    assert config.windows == (100, 100)


def test_longrope_is_served_as_far_as_its_angles_are_one_table() -> None:
    config = make_config("phi3-longrope")
    assert ModelConfig.of(config).max_model_len == 128
    with pytest.raises(UnsupportedModel, match="max_model_len 129 exceeds the 128"):
        ModelConfig.of(config, 129)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (OPTConfig(do_layer_norm_before=False), r"do_layer_norm_before = false \(opt-350m\)"),
        (OPTConfig(word_embed_proj_dim=512), "word_embed_proj_dim 512 beside hidden_size 768"),
        (OPTConfig(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
        (OPTConfig(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine"),
        (OPTConfig(activation_function="tanh"), "activation_function 'tanh' is not served for opt"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "attention scaled otherwise"),
        (GPT2Config(add_cross_attention=True), "add_cross_attention"),
        (make_config("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (make_config("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (make_config("gemma2", layer_types=["chunked_attention"] * 2), "layer type 'chunked_attention'"),
        (make_config("qwen3", rope_parameters=HALF_ROPE), "partial_rotary_factor 0.5 is not served for this family"),
        (make_config("gpt_neox", rope_parameters=HALF_ROPE | {"partial_rotary_factor": 0.4}), "turns 25 of 64 columns"),
    ],
)
def test_what_a_family_does_not_serve_is_refused_by_name(config: PreTrainedConfig, complaint: str) -> None:
    with pytest.raises(UnsupportedModel, match=complaint):
        ModelConfig.of(config)
