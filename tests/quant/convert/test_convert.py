from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Never

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.checkpoint import safetensors_files
from quant.checkpoint.notes import NOTES_NAME
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.sha256sums import SUMS_NAME, first_damaged
from quant.convert import layer
from quant.convert.model import quantize_checkpoint
from quant.convert.rounding import ScaleRule, Strategy, dequantize, quantize_weight, static_scale
from quant.convert.smoothquant import Channels, SmoothGroup, divide, group_migration
from quant.errors import CheckpointError, Unquantizable
from quant.scheme import PRESETS, KVStorage, Scheme
from tests.support.narrowed import float_of, int8_of, present
from tests.support.tiny_llama import Tiny, recipe, tiny_llama

INT8 = [scheme for scheme in PRESETS.values() if scheme.is_int8]
DOWN = "model.layers.0.mlp.down_proj"


@given(
    seed=st.integers(0, 1000),
    exponent=st.integers(-30, 12),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    strategy=st.sampled_from(["channel", "tensor", "group"]),
)
def test_rounding_is_within_half_a_code(seed: int, exponent: int, dtype: torch.dtype, strategy: Strategy) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight[2] = 0
    codes, scale = quantize_weight(weight, ScaleRule(strategy, dtype, 4 if strategy == "group" else None))
    assert scale.dtype == dtype
    assert scale.shape == {"channel": (6, 1), "tensor": (1,), "group": (6, 2)}[strategy]
    assert int(codes.min()) >= -127
    per_element = scale.float().repeat_interleave(4, 1) if strategy == "group" else scale.float()
    error = (dequantize(codes, scale) - weight).abs() / per_element
    assert bool((error <= 0.5001).all())
    assert not codes[2].any()


def test_codes_are_made_with_the_scale_as_stored() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_weight(weight, ScaleRule("channel", torch.bfloat16))
    assert torch.equal(codes, (weight / scale.float()).round().clamp(-127, 127).to(torch.int8))
    unrounded = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round().to(torch.int8)
    assert (codes != unrounded).float().mean() > 0.02


def test_a_scale_that_does_not_exist_is_refused() -> None:
    with pytest.raises(Unquantizable, match="largest magnitude is inf"):
        quantize_weight(torch.tensor([[1.0, float("inf")]]), ScaleRule("channel", torch.bfloat16))
    with pytest.raises(Unquantizable, match=r"torch\.float16"):
        static_scale(torch.tensor([1e9]), torch.float16)
    assert static_scale(torch.zeros(1), torch.float16).item() == 1


FIXED = [scheme.with_alpha(0.5) for scheme in INT8 if not scheme.is_distilled]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", FIXED, ids=lambda scheme: scheme.name)
def test_what_is_written_is_read_back(tiny: Tiny, tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    """Norms undo what the weights were multiplied by; weights are the float ones, each to half a code."""
    out = tiny.quantize(tmp_path / "out", scheme, dtype, notes={"calibration": "self-written"})
    checkpoint = Checkpoint.open(out, dtype, "cpu")
    original = tiny.model.state_dict()
    for name in tiny.linear_names:
        assert scheme.weight != "float"
        num_rows, num_columns = original[f"{name}.weight"].shape
        linear = int8_of(checkpoint.linear(name, num_rows, num_columns, has_bias=False))
        own = scheme.of_down() if name.endswith("down_proj") else scheme
        assert linear.input_codes.kind == own.activation
        assert linear.weight_scale.ndim == (2 if scheme.weight == "group" else 1)
        if scheme.smoothing is None and scheme.weight != "tensor":
            rule = ScaleRule(scheme.weight, dtype, linear_group(scheme))
            codes, scale = quantize_weight(original[f"{name}.weight"], rule)
            assert torch.equal(linear.weight_q, codes), name
            assert torch.equal(linear.weight_scale.flatten(), scale.float().flatten())
    assert (checkpoint.scheme_name, checkpoint.notes["alpha"]) == (scheme.name, scheme.smoothing)
    assert checkpoint.notes["calibration"] == "self-written"
    sources = {group.source for group in tiny.groups}
    assert checkpoint.notes["alphas"] == (dict.fromkeys(sources, 0.5) if scheme.smoothing else {})
    assert len(checkpoint.notes["errors"]) == 2


def linear_group(scheme: Scheme) -> int | None:
    """128 halved until it divides the tiny model's widths of 64 and 96."""
    return None if scheme.group_size is None else 32


def test_the_folded_weights_are_the_smoothed_ones(tiny: Tiny, tmp_path: Path) -> None:
    """Layer 0, whose inputs are the float model's own: the equation by hand, group after group."""
    scheme = PRESETS["w8a8"].with_alpha(0.5)
    out = load_file(tiny.quantize(tmp_path / "out", scheme, torch.bfloat16) / "model.safetensors")
    state = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    absmax = largest_inputs(tiny.model, tiny.windows)
    for group in tiny.groups[:4]:
        seen = {sink: Channels(absmax[sink], absmax[sink]) for sink in group.sinks}
        divide(state, group, group_migration(state, group, seen, 0.5), torch.bfloat16)
        norm = f"{group.source}.weight"
        if state[norm].ndim == 1:
            assert torch.equal(out[norm], state[norm].bfloat16())
        for sink in group.sinks:
            if not sink.endswith("up_proj"):  # divided again by the group behind it
                codes, _ = quantize_weight(state[f"{sink}.weight"], ScaleRule("channel", torch.bfloat16))
                assert (out[f"{sink}.weight"].int() - codes.int()).abs().max() <= 1, sink


def largest_inputs(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Channel absmax of every Linear's input, by hooks on the whole model."""
    absmax: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = args[0].detach().abs().flatten(0, 1).amax(0)
            absmax[name] = torch.maximum(seen, absmax.get(name, seen))

        return hook

    handles = [m.register_forward_pre_hook(keep(n)) for n, m in model.named_modules() if hasattr(m, "in_features")]
    with torch.inference_mode():
        for row in tokens:
            model(row[None])
    for handle in handles:
        handle.remove()
    return absmax


@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("kv", ["float", "int8"])
def test_the_scheme_is_read_back(tiny: Tiny, tmp_path: Path, scheme: Scheme, kv: KVStorage) -> None:
    """Knobs that leave no tensor included; config.json, which other readers parse, is the same for both caches."""
    scheme = replace(scheme.with_alpha(0.7), kv=kv, group_size=linear_group(scheme))
    checkpoint = Checkpoint.open(tiny.quantize(tmp_path / "out", scheme), torch.float32, "cpu")
    assert (checkpoint.schemes, checkpoint.kv) == ((scheme,), kv)
    assert checkpoint.notes["description"] == scheme.describe()
    assert "kv_cache_scheme" not in checkpoint.config["quantization_config"]


def test_notes_that_say_nothing_or_nonsense_of_the_cache(tiny: Tiny, tmp_path: Path) -> None:
    out = tiny.quantize(tmp_path / "out", PRESETS["w8a8"].with_kv("int8"))
    notes = json.loads((out / NOTES_NAME).read_text())
    (out / NOTES_NAME).write_text(json.dumps({key: value for key, value in notes.items() if key != "kv"}))
    assert Checkpoint.open(out, torch.float32, "cpu").schemes == (PRESETS["w8a8"],)
    (out / NOTES_NAME).write_text(json.dumps(notes | {"scheme": "of tomorrow"}))
    renamed = Checkpoint.open(out, torch.float32, "cpu")
    assert renamed.schemes == (replace(PRESETS["w8a8"], name="of tomorrow", kv="int8"),)
    assert renamed.kv == "int8"
    for wrong, complaint in (({"kv": "int4"}, "kv = 'int4' is not served"), ({"alpha": 7}, "smoothing = 7")):
        (out / NOTES_NAME).write_text(json.dumps(notes | wrong))
        with pytest.raises(CheckpointError, match=rf"ottava\.json: {complaint}"):
            Checkpoint.open(out, torch.float32, "cpu")
    (out / NOTES_NAME).unlink()
    foreign = Checkpoint.open(out, torch.float32, "cpu")
    assert (foreign.scheme_name, foreign.kv) == ("int8 channel/token", "float")


def test_the_folder_is_complete_and_nothing_else_is_left(tiny: Tiny, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    out = tiny.quantize(tmp_path / "out", PRESETS["w8a8"], torch.bfloat16, on_progress=lambda *told: seen.append(told))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "ottava.json",
        "tokenizer.json",
        SUMS_NAME,
    }
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["dtype"] == "bfloat16"
    assert [told[:2] for told in seen] == [(1, 2), (2, 2)]
    assert re.fullmatch(r"error \d+\.\d\d%, 0 s left", seen[-1][2])
    stored = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied embeddings stay tied
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored[f"{DOWN}.weight"].dtype == torch.int8
    assert stored[f"{DOWN}.weight_scale"].shape == (64, 1)
    assert stored[f"{DOWN}.weight_scale"].dtype == torch.bfloat16
    assert oct(out.stat().st_mode & 0o777) == "0o755"


def test_biases_and_linears_left_out_stay_float(tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True)
    model.save_pretrained(tmp_path / "float")
    out = tmp_path / "out"
    convert(tmp_path / "float", out, ["model.layers.0.self_attn.q_proj"])
    config = json.loads((out / "config.json").read_text())
    assert len(config["quantization_config"]["ignore"]) == 14
    assert "model.layers.0.self_attn.k_proj" in config["quantization_config"]["ignore"]
    assert config["dtype"] == "float16"
    checkpoint = Checkpoint.open(out, torch.float16, "cpu")
    int8 = int8_of(checkpoint.linear("model.layers.0.self_attn.q_proj", 64, 64, has_bias=True))
    left_out = float_of(checkpoint.linear("model.layers.0.self_attn.o_proj", 64, 64, has_bias=True))
    assert present(int8.bias).dtype == torch.float16
    assert left_out.weight.dtype == torch.float16


def convert(
    source: Path,
    out: Path,
    linear_names: Iterable[str],
    scheme: Scheme | None = None,
    dtype: torch.dtype = torch.float16,
    **changes: Any,
) -> None:
    scheme = scheme or Scheme("plain", "channel", "token")
    said = {name: changes.pop(name) for name in ("notes", "on_progress") if name in changes}
    how = recipe(scheme=scheme, linear_names=linear_names, dtype=dtype, **changes)
    quantize_checkpoint(source, out, how, **said)


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model in a scheme, by name, converted without interruption; each made once."""

    @cache
    def get(name: str) -> Path:
        return tiny.quantize(tmp_path_factory.mktemp("whole") / name, PRESETS[name])

    return get


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
def test_two_runs_give_the_same_bytes(tiny: Tiny, tmp_path: Path, scheme: Scheme) -> None:
    one, other = (tiny.quantize(tmp_path / name, scheme, torch.bfloat16) for name in ("one", "other"))
    assert files_of(one) == files_of(other)


def interrupt_layer_1(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Interrupt the first try at layer 1; the layers that are begun, in order, as they come."""
    real = layer.LayerQuantizer.quantize
    begun: list[int] = []

    def interrupted(self: layer.LayerQuantizer, windows: Sequence[Tensor]) -> layer.QuantizedLayer:
        begun.append(self.index)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        return real(self, windows)

    monkeypatch.setattr(layer.LayerQuantizer, "quantize", interrupted)
    return begun


@pytest.mark.parametrize("name", ["w8a8", "rtn-token", "zeroquant-lkd"])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    tiny: Tiny, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    uninterrupted = files_of(whole(name))
    begun = interrupt_layer_1(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(tmp_path / "out", PRESETS[name])
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    out = tiny.quantize(tmp_path / "out", PRESETS[name])
    assert begun == [0, 1, 1]  # layer 0 was kept
    assert files_of(out) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layers_of_another_scheme_are_not_taken_over(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = interrupt_layer_1(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(tmp_path / "out", PRESETS["w8a8"])
    tiny.quantize(tmp_path / "out", PRESETS["rtn-token"])
    assert begun == [0, 1, 0, 1]


def test_large_models_are_sharded(
    tiny: Tiny, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_file = whole("w8a8")
    monkeypatch.setattr(safetensors_files.ShardWriter.__init__, "__defaults__", (30_000,))
    sharded = tiny.quantize(tmp_path / "sharded", PRESETS["w8a8"])
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    one, other = (Checkpoint.open(folder, torch.float32, "cpu") for folder in (in_one_file, sharded))
    assert one.files.names == other.files.names
    assert all(torch.equal(one.files.get(name), other.files.get(name)) for name in one.files.names)
    # A sharded float model is read as well.
    tiny.model.save_pretrained(tmp_path / "float", max_shard_size="60KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 1
    convert(tmp_path / "float", tmp_path / "again", tiny.linear_names, PRESETS["rtn"], windows=tiny.windows)
    assert Checkpoint.open(tmp_path / "again", torch.float16, "cpu").scheme_name == "rtn"


def test_what_would_fail_again_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """A weight that is not finite, in the second layer: the first one is not kept either."""
    shutil.copytree(tiny.folder, tmp_path / "float")
    state = load_file(tmp_path / "float" / "model.safetensors")
    state["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Unquantizable, match=r"layers\.1\.self_attn\.o_proj\.weight cannot be quantized: .*nan"):
        convert(tmp_path / "float", tmp_path / "out", tiny.linear_names)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize(
    ("kind", "is_kept"),
    [(AssertionError, False), (KeyError, False), (MemoryError, True), (torch.OutOfMemoryError, True)],
)
def test_what_is_kept_after_a_fault(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], is_kept: bool
) -> None:
    """A fault of the program comes again; with more memory the run goes on."""

    def failing(*_: object) -> Never:
        raise kind("no")

    monkeypatch.setattr(layer.LayerQuantizer, "quantize", failing)
    with pytest.raises(kind):
        tiny.quantize(tmp_path / "out", PRESETS["w8a8"])
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"] * is_kept


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
@pytest.mark.parametrize("num_written", [0, 3])
def test_a_full_disk_keeps_what_is_done(
    tiny: Tiny,
    whole: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Exception],
    num_written: int,
) -> None:
    """safetensors has an exception of its own for it."""
    undisturbed = files_of(whole("w8a8"))
    written: list[str] = []

    def filling(*args: Any, **kwargs: Any) -> None:
        if len(written) == num_written:
            raise kind("No space left on device")
        written.append(args[1].name)
        save_file(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_files, "save_file", filling)
        with pytest.raises(OSError, match=rf"out is not written: .*No space left.*; {num_written // 2} of 2 layers"):
            tiny.quantize(tmp_path / "out", PRESETS["w8a8"])
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    out = tiny.quantize(tmp_path / "out", PRESETS["w8a8"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files_of(out) == undisturbed


@pytest.mark.parametrize("name", ["layer-00000.safetensors", "carried-00001.safetensors"])
def test_a_kept_layer_that_is_damaged_is_thrown_away_by_name(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    interrupt_layer_1(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tiny.quantize(tmp_path / "out", PRESETS["w8a8"])
    os.truncate(tmp_path / ".out.part" / name, 100)
    with pytest.raises(CheckpointError, match=rf"{name} is not what was written .*: quantize again"):
        tiny.quantize(tmp_path / "out", PRESETS["w8a8"])
    assert list(tmp_path.iterdir()) == []
    assert first_damaged(tiny.quantize(tmp_path / "out", PRESETS["w8a8"])) is None


def test_an_output_that_exists_is_not_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    tiny.quantize(out, PRESETS["w8a8"])
    with pytest.raises(FileExistsError, match="not empty; remove it"):
        tiny.quantize(out, PRESETS["rtn"])
    assert Checkpoint.open(out, torch.float32, "cpu").scheme_name == "w8a8"
    assert list(tmp_path.iterdir()) == [out]


def test_inputs_that_cannot_be_converted_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="'fp16' is float"):
        tiny.quantize(out, PRESETS["fp16"])
    with pytest.raises(ValueError, match="smooths and no groups say what"):
        tiny.quantize(out, PRESETS["w8a8"], groups=[])
    for name in ("rtn", "w8a8", "zeroquant-lkd"):
        with pytest.raises(ValueError, match=f"'{name}' is calibrated and no windows say on what"):
            tiny.quantize(out, PRESETS[name], windows=None)
    with pytest.raises(CheckpointError, match=r"has no tensor gone\.weight"):
        tiny.quantize(out, PRESETS["w8a8"], linear_names=["gone"])
    with pytest.raises(ValueError, match="lm_head stays float"):
        convert(lm_head_folder(tmp_path), out, ["lm_head"])
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.0\.gone\.weight"):
        tiny.quantize(out, PRESETS["w8a8"], groups=[SmoothGroup("model.layers.0.gone", (DOWN,))])
    quantized = tiny.quantize(tmp_path / "int8", PRESETS["w8a8"])
    with pytest.raises(CheckpointError, match="quantized already"):
        convert(quantized, out, tiny.linear_names)
    assert not out.exists()


def lm_head_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "head"
    folder.mkdir()
    save_file({"lm_head.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_float_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data[3] = 1e6
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match=r"norm\.weight reaches 1e\+06, beyond float16's 65504; use bfloat16"):
        convert(tmp_path / "float", tmp_path / "out", [DOWN])
