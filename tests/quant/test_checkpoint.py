from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.checkpoint import Checkpoint, CheckpointError
from quant.compressed import parse
from quant.linear import FloatLinear, Int8Linear
from quant.scheme import PRESETS

DOWN = "model.layers.0.mlp.down_proj"
SHAPE = (64, 96)


def open_(folder) -> Checkpoint:
    return Checkpoint.open(folder, torch.float32, "cpu")


def edit(folder, change_tensors=None, change_config=None):
    """Rewrite a checkpoint's tensors or config in place."""
    if change_tensors is not None:
        state = load_file(folder / "model.safetensors")
        change_tensors(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if change_config is not None:
        config = json.loads((folder / "config.json").read_text())
        change_config(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """One int8 folder per scheme, written once; tests edit copies."""
    root = tmp_path_factory.mktemp("written")
    return {name: tiny.quantize(root / name, PRESETS[name]) for name in ("w8a8", "rtn")}


@pytest.fixture
def w8a8(written, tmp_path):
    return shutil.copytree(written["w8a8"], tmp_path / "w8a8")


@pytest.fixture
def rtn(written, tmp_path):
    return shutil.copytree(written["rtn"], tmp_path / "rtn")


def test_a_float_folder(tiny):
    checkpoint = Checkpoint.open(tiny.folder, torch.bfloat16, "cpu")
    assert checkpoint.quantization is None
    assert checkpoint.scheme_name is None
    assert checkpoint.config["model_type"] == "llama"
    linear = checkpoint.linear(DOWN, *SHAPE, has_bias=False)
    assert isinstance(linear, FloatLinear)
    assert linear.weight.dtype == torch.bfloat16
    assert "lm_head.weight" not in checkpoint
    assert f"{DOWN}.weight" in checkpoint


# --- what the folder holds ---------------------------------------------------------------------------------------


def test_not_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no config\.json"):
        open_(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("[]", "a JSON list")])
def test_a_config_that_is_no_object(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=rf"pickled weights only \({name}\).*convert them to safetensors"):
        open_(tmp_path)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        open_(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999], ids=str)
def test_a_truncated_file_is_refused_when_opened(w8a8, keep):
    path = w8a8 / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is not a whole safetensors file .*download it again"
    ):
        open_(w8a8)


def shard(folder):
    """Split model.safetensors into two files with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_sharded_folder_reads_the_same(w8a8, written):
    shard(w8a8)
    one, other = open_(w8a8), open_(written["w8a8"])
    assert one.files.names == other.files.names
    assert torch.equal(one.linear(DOWN, *SHAPE, False).weight_q, other.linear(DOWN, *SHAPE, False).weight_q)


def test_a_missing_shard(w8a8):
    shard(w8a8)
    (w8a8 / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        open_(w8a8)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x.weight": "a.safetensors"}, r"a\.safetensors lacks the tensor x\.weight"),
        ({"x.weight": "../a.safetensors"}, "is not a file name of this folder"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit(w8a8, weight_map, message):
    shard(w8a8)
    (w8a8 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_(w8a8)


def test_shards_without_an_index(w8a8):
    shard(w8a8)
    (w8a8 / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds 2 safetensors files and no"):
        open_(w8a8)


# --- what the tensors are ----------------------------------------------------------------------------------------


def drop(name):
    return lambda state: state.pop(name)


def put(name, tensor):
    return lambda state: state.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{DOWN}.weight"), r"has no tensor model\.layers\.0\.mlp\.down_proj\.weight"),
        (drop(f"{DOWN}.weight_scale"), r"has no tensor .*down_proj\.weight_scale"),
        (put(f"{DOWN}.weight", torch.zeros(64, 95, dtype=torch.int8)), r"has shape \[64, 95\], expected \[64, 96\]"),
        (put(f"{DOWN}.weight", torch.zeros(64, 96)), "is stored as float32, expected int8"),
        (put(f"{DOWN}.weight_scale", torch.ones(63, 1)), r"has shape \[63, 1\], expected \[64, 1\]"),
        (put(f"{DOWN}.weight_scale", torch.ones(8, 8)), r"has shape \[8, 8\], expected \[64, 1\]"),
        (put(f"{DOWN}.weight_scale", torch.ones(64, 1, dtype=torch.int32)), "is int32, expected float"),
        (put(f"{DOWN}.weight_scale", torch.zeros(64, 1)), "not positive and finite"),
        (put(f"{DOWN}.weight_scale", torch.full((64, 1), float("nan"))), "not positive and finite"),
        (put(f"{DOWN}.input_scale", torch.ones(1)), r"down_proj\.input_scale would be loaded and never used"),
        (put(f"{DOWN}.weight_zero_point", torch.ones(64, 1, dtype=torch.int8)), "is not zero though .* symmetric"),
        (put(f"{DOWN}.weight_g_idx", torch.ones(96, dtype=torch.int32)), "weight_g_idx would be loaded and never used"),
        (put(f"{DOWN}.output_scale", torch.ones(1)), "output_scale would be loaded and never used"),
        (put(f"{DOWN}.bias", torch.ones(64)), "bias would be loaded and never used"),
    ],
)
def test_a_linear_that_does_not_fit(w8a8, change, message):
    edit(w8a8, change)
    checkpoint = open_(w8a8)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.linear(DOWN, *SHAPE, has_bias=False)


def test_a_missing_bias(w8a8):
    with pytest.raises(CheckpointError, match=r"has no tensor .*down_proj\.bias"):
        open_(w8a8).linear(DOWN, *SHAPE, has_bias=True)


def test_a_static_scheme_without_its_scale(rtn):
    edit(rtn, drop(f"{DOWN}.input_scale"))
    with pytest.raises(CheckpointError, match=r"has no tensor .*down_proj\.input_scale"):
        open_(rtn).linear(DOWN, *SHAPE, has_bias=False)


def test_int8_weights_that_config_does_not_name_are_never_read_as_floats(w8a8):
    edit(w8a8, change_config=lambda quantization: quantization.update(ignore=["lm_head", DOWN]))
    with pytest.raises(CheckpointError, match=r"is stored as int8, expected float; config\.json does not list it"):
        open_(w8a8).linear(DOWN, *SHAPE, has_bias=False)


def test_a_float_tensor_of_another_shape(w8a8):
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[64\], expected \[65\]"):
        open_(w8a8).tensor("model.norm.weight", (65,))


def test_a_float_beyond_float16(w8a8):
    edit(w8a8, put("model.norm.weight", torch.full((64,), 1e5)))
    with pytest.raises(CheckpointError, match="beyond float16's 65504; use bfloat16"):
        Checkpoint.open(w8a8, torch.float16, "cpu").tensor("model.norm.weight", (64,))


@pytest.mark.parametrize("scale_shape", [(64,), (64, 1)], ids=str)
def test_scales_and_zero_points_as_other_tools_store_them(w8a8, scale_shape):
    def change(state):
        state[f"{DOWN}.weight_scale"] = state[f"{DOWN}.weight_scale"].reshape(scale_shape).half()
        state[f"{DOWN}.weight_zero_point"] = torch.zeros(64, 1, dtype=torch.int8)
        state[f"{DOWN}.weight"][0, 0] = -128

    edit(w8a8, change)
    linear = open_(w8a8).linear(DOWN, *SHAPE, has_bias=False)
    assert isinstance(linear, Int8Linear)
    assert linear.weight_q[0, 0] == -128
    assert linear.weight_scale.dtype == torch.float32
    assert linear.weight_scale.shape == (64,)


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)], ids=str)
def test_one_scale_in_every_shape(rtn, scale_shape):
    def change(state):
        for kind in ("weight_scale", "input_scale"):
            state[f"{DOWN}.{kind}"] = state[f"{DOWN}.{kind}"].reshape(scale_shape)

    edit(rtn, change)
    linear = open_(rtn).linear(DOWN, *SHAPE, has_bias=False)
    assert linear.weight_scale.shape == linear.input_scale.shape == (1,)


# --- what config.json says ---------------------------------------------------------------------------------------


def group(**changes):
    args = {"num_bits": 8, "type": "int", "symmetric": True}
    base = {
        "targets": ["Linear"],
        "weights": args | {"strategy": "channel", "dynamic": False},
        "input_activations": args | {"strategy": "token", "dynamic": True},
    }
    return base | changes


def config(groups=None, **changes):
    base = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group()} if groups is None else groups,
    }
    return {"quantization_config": base | changes}


def weights(**changes):
    return {"g": group(weights=group()["weights"] | changes)}


def inputs(**changes):
    return {"g": group(input_activations=group()["input_activations"] | changes)}


@pytest.mark.parametrize(
    "accepted",
    [
        config(),
        config(format="naive-quantized"),
        config({"g": group(format="int-quantized")}, format="mixed-precision"),
        config({"g": group(format="naive-quantized")}, format=None),
        config({"g": group(output_activations=None)}),
        config(
            {
                "g": {
                    "targets": ["Linear"],
                    "weights": {"group_size": -1},
                    "input_activations": {"strategy": "token", "dynamic": True},
                }
            }
        ),
        config(weights(group_size=None, observer="mse", observer_kwargs={"maxshrink": 0.2}, actorder=None)),
        config(weights(group_size=-1, observer="minmax", block_structure=None, actorder="weight")),
        config(sparsity_config={}, transform_config={}, kv_cache_scheme=None, global_compression_ratio=None),
        config(
            sparsity_config=None, transform_config={"config_groups": {}}, version="0.15", quantization_status="frozen"
        ),
        config(sparsity_config={"format": "dense", "global_sparsity": 0.14, "sparsity_structure": "unstructured"}),
        config({"g": group(targets=["re:.*_proj$"])}, ignore=None),
    ],
)
def test_what_is_accepted(accepted):
    linear_format = parse(accepted).format_of(DOWN)
    assert (linear_format.weight, linear_format.activation) == ("channel", "token")


@pytest.mark.parametrize(
    ("args", "weight", "activation"),
    [
        (({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}), "tensor", "static"),
        (({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": True}), "tensor", "tensor"),
        (({}, {}), "tensor", "static"),
        (({"strategy": "CHANNEL"}, {"strategy": "token", "dynamic": True}), "channel", "token"),
    ],
)
def test_the_scales_are_read_from_strategy_and_dynamic(args, weight, activation):
    groups = {"g": {"targets": ["Linear"], "weights": args[0], "input_activations": args[1]}}
    linear_format = parse(config(groups)).format_of(DOWN)
    assert (linear_format.weight, linear_format.activation) == (weight, activation)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (config(format="pack-quantized"), "format 'pack-quantized'"),
        (config(format="float-quantized"), "format 'float-quantized'"),
        (config(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (config(format="marlin-24"), "format 'marlin-24'"),
        (config(format="dense"), "format 'dense'"),
        (config({"g": group(format="pack-quantized")}), r"'pack-quantized' in config_groups\.g"),
        (config(weights(num_bits=4)), r"weights\.num_bits = 4"),
        (config(weights(num_bits={"default": 8})), r"weights\.num_bits = \{'default': 8\}"),
        (config(inputs(num_bits=16)), r"input_activations\.num_bits = 16"),
        (config(weights(type="float")), r"weights\.type = 'float'"),
        (config(inputs(type="float")), r"input_activations\.type = 'float'"),
        (config(weights(strategy="group", group_size=128)), r"weights\.strategy = 'group'"),
        (config(weights(strategy=None, group_size=128)), r"weights\.strategy = 'group'"),
        (config(weights(strategy="block")), r"weights\.strategy = 'block'"),
        (config(weights(symmetric=False)), "asymmetric weights"),
        (config(weights(dynamic=True)), r"weights\.dynamic"),
        (config(weights(actorder="group")), r"weights\.actorder = 'group'"),
        (config(inputs(symmetric=False)), "asymmetric per-token activations with an input_zero_point"),
        (config(inputs(symmetric=False, strategy="tensor", dynamic=False)), "asymmetric static activations"),
        (config(inputs(dynamic=False)), "strategy 'token' and dynamic = False"),
        (config(inputs(strategy="tensor", dynamic="local")), "dynamic = 'local'"),
        (config(inputs(strategy="group", group_size=128)), "input_activations with strategy 'group'"),
        (config({"g": group(input_activations=None)}), r"input_activations = null \(int8 on one side"),
        (config({"g": group(weights=None)}), r"weights = null"),
        (config({"g": group(output_activations={"num_bits": 8})}), r"g\.output_activations"),
        (config({"W8A8": ["Linear"]}), r"config_groups\.W8A8 = \['Linear'\], a preset's name"),
        (config({}), "without config_groups"),
        (config({"g": group(targets=["Embedding"])}), "int8 embedding"),
        (config({"g": group(targets="Linear")}), r"targets = 'Linear' \(expected a list"),
        (config({"g": group(targets=["re:("])}), "does not compile"),
        (config(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}), "transform_config"),
        (config(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
        (config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (config(quant_method="gptq"), "quant_method 'gptq'"),
        ({"quantization_config": []}, r"quantization_config = \[\]"),
        ({"compression_config": {}}, "compression_config"),
    ],
)
def test_what_is_refused_says_what_and_names_a_remedy(refused, message):
    with pytest.raises(CheckpointError, match=rf"{message}.*quantize the float model with `ottava quantize`"):
        parse(refused)


@pytest.mark.parametrize(
    ("targets", "ignore", "is_int8"),
    [
        (["Linear"], [], True),
        (["Linear"], ["lm_head"], True),
        (["Linear"], [DOWN], False),
        (["Linear"], ["re:.*down_proj"], False),
        (["Linear"], ["re:down_proj"], True),
        (["Linear"], ["Linear"], False),
        (["Linear"], ["mlp.down_proj"], True),
        ([DOWN], [], True),
        (["re:.*self_attn.*"], [], False),
        (["re:model.layers.0.*"], ["re:.*gate.*"], True),
        (["LlamaAttention"], [], False),
    ],
)
def test_targets_and_ignore_are_names_patterns_or_classes(targets, ignore, is_int8):
    parsed = parse(config({"g": group(targets=targets)}, ignore=ignore))
    assert (parsed.format_of(DOWN) is not None) == is_int8


def test_the_most_specific_target_decides():
    groups = {
        "static": weights(strategy="tensor")["g"] | {"targets": ["Linear"]},
        "named": group(targets=[DOWN]),
        "pattern": weights(strategy="tensor")["g"] | {"targets": ["re:.*down_proj"]},
    }
    assert parse(config(groups)).format_of(DOWN).weight == "channel"
    assert parse(config(groups)).format_of("model.layers.1.mlp.down_proj").weight == "tensor"
