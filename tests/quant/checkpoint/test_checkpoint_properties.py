"""Whatever we write is read back, and whatever a config says, it is served or refused by name."""

from __future__ import annotations

import copy
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.checkpoint.compressed_tensors import render
from quant.checkpoint.notes import NOTES_NAME, notes_of
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.safetensors_files import ShardWriter
from quant.errors import CheckpointError
from quant.linear import Int8Linear
from quant.scheme import ActivationScale, KVStorage, Rounding, Scheme, Smoothing, WeightScale
from service.models.decoder import score
from service.models.loader import load_decoder
from tests.quant.fixtures import FIXTURES
from tests.support.narrowed import present

CPU = torch.device("cpu")


WEIGHTS: tuple[WeightScale, ...] = "tensor", "channel", "group"
ACTIVATIONS: tuple[ActivationScale, ...] = "static", "tensor", "token"
ROUNDINGS: tuple[Rounding, ...] = "nearest", "gptq"
KV_STORAGES: tuple[KVStorage, ...] = "float", "int8"
SEARCH: Smoothing = "search"
SMOOTHINGS: st.SearchStrategy[Smoothing | None] = st.none() | st.just(SEARCH) | st.floats(0, 1)


@st.composite
def forms(draw: st.DrawFn) -> Scheme:
    """Every way in which we store a Linear."""
    weight: WeightScale = draw(st.sampled_from(WEIGHTS))
    activation: ActivationScale = draw(st.sampled_from(ACTIVATIONS))
    rounding: Rounding = draw(st.sampled_from(ROUNDINGS))
    has_outliers = weight != "group" and activation == "token" and draw(st.booleans())
    return Scheme(
        "drawn",
        weight,
        activation,
        smoothing=None if has_outliers else draw(SMOOTHINGS),
        outliers=draw(st.floats(0.5, 100)) if has_outliers else None,
        kv=draw(st.sampled_from(KV_STORAGES)),
        rounding=rounding,
        group_size=draw(st.sampled_from([32, 64])) if weight == "group" else None,
        is_distilled=rounding == "nearest" and not has_outliers and draw(st.booleans()),
    )


@given(
    scheme=forms(),
    num_rows=st.integers(1, 9),
    num_groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    has_bias=st.booleans(),
    is_transposed=st.booleans(),
    max_bytes=st.sampled_from([1, 2**20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_form_that_is_written_is_read_back(
    scheme: Scheme,
    num_rows: int,
    num_groups: int,
    dtype: torch.dtype,
    has_bias: bool,
    is_transposed: bool,
    max_bytes: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_columns = num_groups * (scheme.group_size or 32)
    codes = torch.randint(-127, 128, (num_rows, num_columns), generator=generator, dtype=torch.int8)
    scale_shape = {"tensor": (1,), "channel": (num_rows, 1), "group": (num_rows, num_groups)}[scheme.weight]
    scale = torch.rand(scale_shape, generator=generator).add_(0.01).to(dtype)
    stored = {"x.weight": codes.t().contiguous() if is_transposed else codes, "x.weight_scale": scale}
    stored |= {"x.bias": torch.randn(num_rows, generator=generator).to(dtype)} if has_bias else {}
    stored |= {"x.input_scale": torch.full((1,), 0.37).to(dtype)} if scheme.activation == "static" else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = ShardWriter(folder, max_bytes)
        for key, tensor in stored.items():
            writer.add(key, tensor)
        writer.close()
        (folder / "config.json").write_text(json.dumps({"quantization_config": render(scheme, ["lm_head"])}))
        (folder / NOTES_NAME).write_text(json.dumps(notes_of(scheme)))
        checkpoint = Checkpoint.open(folder, dtype, CPU)
        linear = checkpoint.linear("x", num_rows, num_columns, has_bias, is_transposed=is_transposed)
    assert checkpoint.schemes == (scheme,)
    assert isinstance(linear, Int8Linear)
    assert torch.equal(linear.weight_q, codes)
    assert torch.equal(linear.weight_scale.flatten(), scale.float().flatten())
    how = linear.input_codes
    assert (how.kind, linear.out_dtype, how.outliers) == (scheme.activation, dtype, scheme.outliers)
    assert how.zero_point is None
    for kind, found in (("bias", linear.bias), ("input_scale", how.scale)):
        expected = stored.get(f"x.{kind}")
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found.float(), present(expected).float())


WORDS = [
    "tensor", "channel", "group", "token", "block", "int", "float", "int-quantized", "pack-quantized", "Linear", "W8A8",
    "re:.*", "re:(", "re:.*down_proj", "model.layers.0.mlp.down_proj", "lm_head", "gptq", "compressed-tensors", "dense",
]  # fmt: skip
KEYS = [
    "config_groups", "group_0", "weights", "input_activations", "output_activations", "targets", "strategy", "num_bits",
    "type", "symmetric", "dynamic", "group_size", "actorder", "scale_dtype", "format", "ignore", "quant_method",
    "kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config", "of_tomorrow",
]  # fmt: skip
leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 4, 8, 16, 32, 64, 128, 8.0, 1e300])
    | st.sampled_from(WORDS)
    | st.text(max_size=3)
)
values: st.SearchStrategy[Any] = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, Any]:
    """A fixture's name and its quantization_config with one to three values changed, added or left out."""
    name = draw(st.sampled_from(["dynamic", "static", "static-asymmetric", "group"]))
    config = json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]
    for _ in range(draw(st.integers(1, 3))):
        config = _changed(draw, config)
    return name, config


def _changed(draw: st.DrawFn, node: dict[str, Any]) -> dict[str, Any]:
    """The tree with one node, reached by a random walk, replaced."""
    node = copy.copy(node)
    key: str = (
        draw(st.sampled_from(sorted(node))) if len(node) and draw(st.integers(0, 7)) else draw(st.sampled_from(KEYS))
    )
    if isinstance(node.get(key), dict) and draw(st.integers(0, 9)):
        node[key] = _changed(draw, node[key])
    elif key in node and draw(st.booleans()):
        del node[key]
    else:
        node[key] = draw(values)
    return node


@settings(max_examples=300)
@given(
    case=mutated(), notes=st.dictionaries(st.sampled_from(["scheme", "alpha", "kv", "outliers", "rounding"]), values)
)
def test_a_config_is_served_or_refused_by_name(case: tuple[str, dict[str, Any]], notes: dict[str, Any]) -> None:
    name, quantization = case
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = json.loads((FIXTURES / name / "config.json").read_text()) | {"quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / NOTES_NAME).write_text(json.dumps(notes))
        (folder / "model.safetensors").symlink_to(FIXTURES / name / "model.safetensors")
        with suppress(CheckpointError):
            assert score(load_decoder(folder, torch.float32, CPU), torch.arange(8)).isfinite().all()


def test_the_mutations_reach_both_ends() -> None:
    """One change that leaves the fixture served, one that does not: the property above is not empty."""
    config = json.loads((FIXTURES / "dynamic" / "config.json").read_text())
    served = config["quantization_config"] | {"ignore": []}
    refused = config["quantization_config"] | {"of_tomorrow": 1}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "model.safetensors").symlink_to(FIXTURES / "dynamic" / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": served}))
        assert score(load_decoder(folder, torch.float32, CPU), torch.arange(8)).isfinite().all()
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": refused}))
        with pytest.raises(CheckpointError, match="the unknown key of_tomorrow"):
            load_decoder(folder, torch.float32, CPU)
