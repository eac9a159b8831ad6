"""What config.json says: accepted, refused by name, and which Linear each target means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quant.checkpoint.compressed_tensors import parse, render
from quant.checkpoint.notes import notes_of, schemes_of
from quant.checkpoint.targets import LinearFormat
from quant.errors import CheckpointError
from quant.scheme import PRESETS, Scheme
from tests.support.narrowed import present

DOWN = "model.layers.0.mlp.down_proj"


def group(**changes: object) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "int", "symmetric": True}
    base = {
        "targets": ["Linear"],
        "weights": args | {"strategy": "channel", "dynamic": False},
        "input_activations": args | {"strategy": "token", "dynamic": True},
    }
    return base | changes


def config(groups: dict[str, Any] | None = None, **changes: object) -> dict[str, Any]:
    base = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group()} if groups is None else groups,
    }
    return {"quantization_config": base | changes}


def weights(**changes: object) -> dict[str, Any]:
    return {"g": group(weights=group()["weights"] | changes)}


def inputs(**changes: object) -> dict[str, Any]:
    return {"g": group(input_activations=group()["input_activations"] | changes)}


def format_of(config: dict[str, Any], name: str) -> LinearFormat:
    """Of a Linear that the config has in int8."""
    return present(present(parse(config)).format_of(name))


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
        config({"W8A8": ["Linear"]}),
        config({"int8": ["re:.*mlp.*"]}),
    ],
)
def test_what_is_accepted(accepted: dict[str, Any]) -> None:
    linear_format = format_of(accepted, DOWN)
    assert (linear_format.weight, linear_format.activation) == ("channel", "token")


@pytest.mark.parametrize(
    ("args", "weight", "activation"),
    [
        (({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}), "tensor", "static"),
        (({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": True}), "tensor", "tensor"),
        (({}, {}), "tensor", "static"),
        (({"strategy": "group", "group_size": 64}, {"strategy": "token", "dynamic": True}), "group", "token"),
        (({"group_size": 32}, {"strategy": "tensor"}), "group", "static"),
        (({"strategy": "CHANNEL"}, {"strategy": "token", "dynamic": True}), "channel", "token"),
    ],
)
def test_the_scales_are_read_from_strategy_and_dynamic(
    args: tuple[dict[str, Any], dict[str, Any]], weight: str, activation: str
) -> None:
    groups = {"g": {"targets": ["Linear"], "weights": args[0], "input_activations": args[1]}}
    linear_format = format_of(config(groups), DOWN)
    assert (linear_format.weight, linear_format.activation) == (weight, activation)
    assert linear_format.group_size == args[0].get("group_size")


def test_asymmetric_static_activations_have_a_zero_point() -> None:
    asymmetric = inputs(strategy="tensor", dynamic=False, symmetric=False, zp_dtype="torch.int8")
    assert format_of(config(asymmetric), DOWN) == LinearFormat("channel", "static", has_zero_point=True)
    assert format_of(config(asymmetric), DOWN).name == "int8 channel/static asymmetric"


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
        (config(weights(strategy="group", group_size=16)), r"weights\.group_size = 16 \(not a power of two from 32"),
        (config(weights(strategy="group", group_size=96)), r"weights\.group_size = 96"),
        (config(weights(strategy="group")), r"weights\.group_size = None"),
        (config(weights(strategy="channel", group_size=128)), r"weights\.group_size = 128 with strategy 'channel'"),
        (config(weights(strategy="block")), r"weights\.strategy = 'block'"),
        (config(weights(symmetric=False)), "asymmetric weights"),
        (config(weights(dynamic=True)), r"weights\.dynamic"),
        (config(weights(actorder="group")), r"weights\.actorder = 'group'"),
        (config(inputs(symmetric=False)), "asymmetric per-token activations with a zero point"),
        (config(inputs(symmetric=False, strategy="tensor")), "asymmetric per-tensor activations with a zero point"),
        (config(inputs(symmetric="no")), r"input_activations\.symmetric = 'no'"),
        (config(inputs(scale_dtype="torch.uint8")), r"input_activations\.scale_dtype = 'torch\.uint8'"),
        (config(inputs(columns=3)), r"the unknown key columns in config_groups\.g\.input_activations"),
        (config({"g": group(outliers=6.0)}), r"the unknown key outliers in config_groups\.g"),
        (config(modules_to_not_convert=[]), "the unknown key modules_to_not_convert in quantization_config"),
        (config(inputs(dynamic=False)), "strategy 'token' and dynamic = False"),
        (config(inputs(strategy="tensor", dynamic="local")), "dynamic = 'local'"),
        (config(inputs(strategy="group", group_size=128)), "input_activations with strategy 'group'"),
        (config({"g": group(input_activations=None)}), r"input_activations = null \(int8 on one side"),
        (config({"g": group(weights=None)}), r"weights = null"),
        (config({"g": group(output_activations={"num_bits": 8})}), r"g\.output_activations"),
        (config({"W4A16": ["Linear"]}), r"config_groups\.W4A16 = \['Linear'\], a preset other than W8A8 and INT8"),
        (config({}), "without config_groups"),
        (config({"g": group(targets=["Embedding"])}), "int8 embedding"),
        (config({"g": group(targets="Linear")}), r"targets = 'Linear' \(expected a list"),
        (config({"g": group(targets=["re:("])}), "does not compile"),
        (config({"g": group(targets=["re:a{99999999999}"])}), "does not compile"),
        (config(ignore="lm_head"), "ignore = 'lm_head'"),
        (config(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}), "transform_config"),
        (config(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
        (config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (config(moe_sparsity_config={"layers": {}}), "moe_sparsity_config"),
        (config(quant_method="gptq"), r"quant_method 'gptq' \(packed weights with float activations\)"),
        (config(quant_method="awq"), r"quant_method 'awq' \(packed 4-bit weights"),
        (config(quant_method="bitsandbytes"), r"quant_method 'bitsandbytes' \(weights that bitsandbytes unpacks"),
        (config(quant_method="fp8"), r"quant_method 'fp8' \(float8"),
        (config(quant_method=["gptq"]), r"quant_method \['gptq'\]"),
        ({"quantization_config": {"load_in_8bit": True}}, "the unknown key load_in_8bit"),
        ({"quantization_config": []}, r"quantization_config = \[\]"),
        ({"compression_config": {}}, "compression_config"),
    ],
)
def test_what_is_refused_says_what_and_names_a_remedy(refused: dict[str, Any], message: str) -> None:
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
def test_targets_and_ignore_are_names_patterns_or_classes(targets: list[str], ignore: list[str], is_int8: bool) -> None:
    parsed = present(parse(config({"g": group(targets=targets)}, ignore=ignore)))
    assert (parsed.format_of(DOWN) is not None) == is_int8


def test_the_most_specific_target_decides() -> None:
    groups = {
        "static": weights(strategy="tensor")["g"] | {"targets": ["Linear"]},
        "named": group(targets=[DOWN]),
        "pattern": weights(strategy="tensor")["g"] | {"targets": ["re:.*down_proj"]},
    }
    assert format_of(config(groups), DOWN).weight == "channel"
    assert format_of(config(groups), "model.layers.1.mlp.down_proj").weight == "tensor"


def test_the_last_linears_of_mlps_may_have_scales_per_token() -> None:
    downs = ["model.layers.0.mlp.down_proj", "model.layers.31.mlp.down_proj", "model.layers.7.mlp.experts.12.down_proj"]
    written = {"quantization_config": render(PRESETS["w8a8-static"], ["lm_head"], downs)}
    assert [format_of(written, name).activation for name in (*downs, "model.layers.8.mlp.down_proj")] == ["token"] * 4
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj_x"):
        assert format_of(written, name) == LinearFormat("channel", "static")
    # A number that is a part of a word is no layer's.
    opt = {"quantization_config": render(PRESETS["w8a8-static"], ["lm_head"], ["model.decoder.layers.0.fc2"])}
    kinds = [format_of(opt, f"model.decoder.layers.11.{name}").activation for name in ("fc1", "fc2")]
    assert kinds == ["static", "token"]
    notes = notes_of(PRESETS["w8a8-static"])
    assert schemes_of(parse(written), notes) == (PRESETS["w8a8-static"],)
    static = replace(PRESETS["w8a8-static"], has_token_down=False)
    assert list(render(static, ["lm_head"], downs)["config_groups"]) == ["group_0"]
    # A folder of an earlier version, whose notes do not know of it.
    del notes["has_token_down"]
    (read,) = schemes_of(parse({"quantization_config": render(static, ["lm_head"])}), notes)
    assert (read, read.label) == (static, "w8a8-static, static everywhere")


FORMS = [
    Scheme("made", weight, activation, group_size=64 if weight == "group" else None)
    for weight in ("tensor", "channel", "group")
    for activation in ("static", "tensor", "token")
]


@pytest.mark.parametrize("scheme", FORMS, ids=lambda scheme: f"{scheme.weight}-{scheme.activation}")
def test_what_is_rendered_is_parsed_and_holds_no_key_unknown_to_compressed_tensors(scheme: Scheme) -> None:
    written = render(scheme, ["lm_head"])
    assert scheme.weight != "float"
    assert scheme.activation != "float"
    linear_format = format_of({"quantization_config": written}, DOWN)
    assert linear_format == LinearFormat(scheme.weight, scheme.activation, scheme.group_size)
    assert present(parse({"quantization_config": written})).format_of("lm_head") is None
    known = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig
    assert written.keys() <= known.model_fields.keys()
    # Its models of a group and of its arguments allow no other key.
    group_read = known.model_validate(written).config_groups["group_0"]
    assert (group_read.weights.strategy, group_read.weights.group_size) == (scheme.weight, scheme.group_size)
