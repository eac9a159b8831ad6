from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant import tensors
from quant.checkpoint import NOTES_NAME, Checkpoint, CheckpointError
from quant.convert import quantize_weight, static_scale
from quant.scheme import PRESETS, Scheme
from quant.smooth import SmoothGroup, fold

INT8 = [scheme for scheme in PRESETS.values() if scheme.is_int8]
DOWN = "model.layers.0.mlp.down_proj"


@given(
    seed=st.integers(0, 1000),
    exponent=st.integers(-30, 12),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    strategy=st.sampled_from(["channel", "tensor"]),
)
def test_rounding_is_within_half_a_code(seed, exponent, dtype, strategy):
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight[2] = 0
    codes, scale = quantize_weight(weight, strategy, dtype)
    assert scale.dtype == dtype
    assert scale.shape == ((6, 1) if strategy == "channel" else (1,))
    assert int(codes.min()) >= -127
    error = (codes.float() * scale.float() - weight).abs() / scale.float()
    assert bool((error <= 0.5001).all())
    assert not codes[2].any()


def test_codes_are_made_with_the_scale_as_stored():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_weight(weight, "channel", torch.bfloat16)
    assert torch.equal(codes, (weight / scale.float()).round().clamp(-127, 127).to(torch.int8))
    unrounded = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round().to(torch.int8)
    assert (codes != unrounded).float().mean() > 0.02


def test_a_scale_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="largest magnitude is inf"):
        quantize_weight(torch.tensor([[1.0, float("inf")]]), "channel", torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.float16"):
        static_scale(torch.tensor([1e9]), torch.float16)
    assert static_scale(torch.zeros(1), torch.float16).item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
def test_what_is_written_is_read_back(tiny, tmp_path, scheme, dtype):
    out = tiny.quantize(tmp_path / "out", scheme, dtype, notes={"calibration": "self-written"})
    checkpoint = Checkpoint.open(out, dtype, "cpu")
    state = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    absmax = tiny.absmax if scheme.smoothing is None else fold(state, tiny.groups, tiny.absmax, scheme.smoothing, dtype)
    for name in tiny.linear_names:
        weight = state[f"{name}.weight"]
        codes, scale = quantize_weight(weight, scheme.weight, dtype)
        linear = checkpoint.linear(name, *weight.shape, has_bias=False)
        assert torch.equal(linear.weight_q, codes), name
        assert torch.equal(linear.weight_scale, scale.float().reshape(-1))
        assert (linear.activation, linear.out_dtype) == (scheme.activation, dtype)
        if scheme.activation == "static":
            assert linear.input_scale.item() == pytest.approx(absmax[name].max().item() / 127, rel=5e-3)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(checkpoint.tensor(norm, (64,)), state[norm].to(dtype))
    assert checkpoint.scheme_name == scheme.name
    assert checkpoint.notes["alpha"] == scheme.smoothing
    assert checkpoint.notes["calibration"] == "self-written"


@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("kv", ["float", "int8"])
def test_the_scheme_is_read_back(tiny, tmp_path, scheme, kv):
    """Knobs that leave no tensor included; config.json, which other readers parse, is the same for both caches."""
    scheme = replace(scheme, smoothing=scheme.smoothing and 0.7, kv=kv)
    checkpoint = Checkpoint.open(tiny.quantize(tmp_path / "out", scheme), torch.float32, "cpu")
    assert (checkpoint.scheme, checkpoint.kv) == (scheme, kv)
    assert checkpoint.notes["description"] == scheme.describe()
    assert "kv_cache_scheme" not in checkpoint.config["quantization_config"]


def test_notes_that_say_nothing_or_nonsense_of_the_cache(tiny, tmp_path):
    out = tiny.quantize(tmp_path / "out", PRESETS["w8a8"].with_kv("int8"))
    notes = json.loads((out / NOTES_NAME).read_text())
    (out / NOTES_NAME).write_text(json.dumps({key: value for key, value in notes.items() if key != "kv"}))
    assert Checkpoint.open(out, torch.float32, "cpu").scheme == PRESETS["w8a8"]
    (out / NOTES_NAME).write_text(json.dumps(notes | {"scheme": "of tomorrow"}))
    assert Checkpoint.open(out, torch.float32, "cpu").scheme is None
    assert Checkpoint.open(out, torch.float32, "cpu").kv == "int8"
    for wrong, complaint in (({"kv": "int4"}, "kv = 'int4' is not served"), ({"alpha": 7}, "smoothing = 7")):
        (out / NOTES_NAME).write_text(json.dumps(notes | wrong))
        with pytest.raises(CheckpointError, match=rf"ottava\.json: {complaint}"):
            _ = Checkpoint.open(out, torch.float32, "cpu").scheme
    (out / NOTES_NAME).unlink()
    foreign = Checkpoint.open(out, torch.float32, "cpu")
    assert (foreign.scheme, foreign.kv) == (None, "float")


def test_the_folder_is_complete_and_nothing_else_is_left(tiny, tmp_path):
    seen = []
    out = tiny.quantize(
        tmp_path / "out", PRESETS["w8a8"], torch.bfloat16, on_progress=lambda done, total: seen.append((done, total))
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "ottava.json", "tokenizer.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["dtype"] == "bfloat16"
    assert seen[-1] == (14, 14)
    stored = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied embeddings stay tied
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored[f"{DOWN}.weight"].dtype == torch.int8
    assert stored[f"{DOWN}.weight_scale"].shape == (64, 1)
    assert stored[f"{DOWN}.weight_scale"].dtype == torch.bfloat16
    assert oct(out.stat().st_mode & 0o777) == "0o755"


def test_groups_sharing_a_linear_are_folded_together_in_any_order(tiny, tmp_path):
    forward = tiny.quantize(tmp_path / "a", PRESETS["w8a8"])
    regrouped = tiny.quantize(tmp_path / "b", PRESETS["w8a8"], groups=[*tiny.groups[3:], *tiny.groups[:3]])
    one, other = (load_file(out / "model.safetensors") for out in (forward, regrouped))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_biases_and_linears_left_out_stay_float(tmp_path):
    torch.manual_seed(0)
    source = tmp_path / "float"
    source.mkdir()
    weights = {f"m.{name}.weight": torch.randn(8, 8).bfloat16() for name in ("a", "b", "embed_tokens")}
    save_file(weights | {"m.a.bias": torch.randn(8), "m.ids": torch.arange(3)}, source / "model.safetensors")
    (source / "config.json").write_text('{"torch_dtype": "float32"}')
    out = tmp_path / "out"
    convert(source, out, ["m.a"])
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", "m.b"]
    assert config["torch_dtype"] == config["dtype"] == "float16"
    checkpoint = Checkpoint.open(out, torch.float16, "cpu")
    assert checkpoint.linear("m.a", 8, 8, has_bias=True).bias.dtype == torch.float16
    assert checkpoint.linear("m.b", 8, 8, has_bias=False).weight.dtype == torch.float16
    assert load_file(out / "model.safetensors")["m.ids"].dtype == torch.int64


def convert(source, out, linear_names, scheme=None, dtype=torch.float16, **changes):
    from quant.convert import quantize_checkpoint

    scheme = scheme or Scheme("plain", "channel", "token")
    arguments = {"absmax": {}, "groups": [], "notes": {}} | changes
    quantize_checkpoint(source, out, scheme, linear_names=linear_names, dtype=dtype, **arguments)


def test_large_models_are_sharded(tiny, tmp_path, monkeypatch):
    whole = tiny.quantize(tmp_path / "whole", PRESETS["w8a8"])
    monkeypatch.setattr(tensors.ShardWriter.__init__, "__defaults__", (30_000,))
    sharded = tiny.quantize(tmp_path / "sharded", PRESETS["w8a8"])
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    one, other = (Checkpoint.open(folder, torch.float32, "cpu") for folder in (whole, sharded))
    assert one.files.names == other.files.names
    assert all(torch.equal(one.files.get(name), other.files.get(name)) for name in one.files.names)
    # A sharded float model is read as well.
    tiny.model.save_pretrained(tmp_path / "float", max_shard_size="60KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 1
    convert(tmp_path / "float", tmp_path / "again", tiny.linear_names, PRESETS["rtn"], absmax=tiny.absmax)
    assert Checkpoint.open(tmp_path / "again", torch.float16, "cpu").scheme_name == "rtn"


def test_a_failure_half_way_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        tiny.quantize(tmp_path / "out", PRESETS["w8a8"])
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_not_overwritten(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    tiny.quantize(out, PRESETS["w8a8"])
    with pytest.raises(FileExistsError, match="not empty; remove it"):
        tiny.quantize(out, PRESETS["rtn"])
    assert Checkpoint.open(out, torch.float32, "cpu").scheme_name == "w8a8"
    assert list(tmp_path.iterdir()) == [out]


def test_inputs_that_cannot_be_converted_are_refused(tiny, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="'fp16' is float"):
        tiny.quantize(out, PRESETS["fp16"])
    with pytest.raises(ValueError, match="smooths and no groups say what"):
        tiny.quantize(out, PRESETS["w8a8"], groups=[])
    with pytest.raises(ValueError, match=r"needs the activation range of model\.layers\.0"):
        tiny.quantize(out, PRESETS["rtn"], absmax={})
    with pytest.raises(ValueError, match=r"no activation range for model\.layers\.0"):
        tiny.quantize(out, PRESETS["w8a8"], absmax={})
    with pytest.raises(CheckpointError, match=r"has no tensor gone\.weight"):
        tiny.quantize(out, PRESETS["w8a8"], linear_names=["gone"])
    with pytest.raises(ValueError, match="lm_head stays float"):
        convert(lm_head_folder(tmp_path), out, ["lm_head"])
    with pytest.raises(ValueError, match=r"no tensor gone\.weight"):
        tiny.quantize(out, PRESETS["w8a8"], groups=[SmoothGroup("gone", (DOWN,))])
    quantized = tiny.quantize(tmp_path / "int8", PRESETS["w8a8"])
    with pytest.raises(CheckpointError, match="quantized already"):
        convert(quantized, out, tiny.linear_names)
    assert not out.exists()


def lm_head_folder(tmp_path):
    folder = tmp_path / "head"
    folder.mkdir()
    save_file({"lm_head.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    folder = lm_head_folder(tmp_path)
    save_file({"a.weight": torch.tensor([[float("nan")]])}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight cannot be quantized: .*nan"):
        convert(folder, tmp_path / "out", ["a"])


def test_a_float_beyond_float16_is_refused(tmp_path):
    folder = lm_head_folder(tmp_path)
    save_file({"norm.weight": torch.tensor([1e6])}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight reaches 1e\+06, beyond float16's 65504; use bfloat16"):
        convert(folder, tmp_path / "out", [])
