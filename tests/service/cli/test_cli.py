"""The command line, run in this process as `ottava` runs it; a few times as a process of its own."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from quant import __version__
from quant.checkpoint.reader import Checkpoint
from quant.scheme import PRESETS, Scheme
from service import cli
from service.errors import InvalidSettings
from service.models.families import FAMILIES
from service.settings import Settings
from service.store.calibration import Calibration, calibration_windows
from tests.support.harness import until
from tests.support.narrowed import int8_of
from tests.support.tiny_models import change_tensors, save_tiny_model

ROOT = Path(__file__).parents[3]
INT8 = [name for name, scheme in PRESETS.items() if scheme.is_int8]
PROGRESS = re.compile(r"(ottava: |\S+ \S+ INFO web service\.cli\.serve: ).*\n")
"""How far a command is, where stderr is no terminal."""


class Command(Protocol):
    def __call__(self, *arguments: object) -> tuple[int, str, str]: ...


class Refusal(Protocol):
    def __call__(self, *arguments: object) -> str: ...


class Evaluated(Protocol):
    def __call__(self, *arguments: object) -> tuple[dict[str, Any], list[dict[str, Any]], str]: ...


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What `main` changes for a process is put back, and nothing is read of this machine's set-up."""
    for name in [name for name in os.environ if name.upper().startswith("OTTAVA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers says no types


@pytest.fixture
def ottava(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command: exit code, stdout, stderr without the lines of progress."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ottava", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capfd.readouterr()
        code = exit_info.value.code
        return (code if isinstance(code, int) else int(code is not None)), out, PROGRESS.sub("", err)

    return run


@pytest.fixture(scope="module")
def document() -> Callable[..., dict[str, Any]]:
    """FastAPI's document of the routes, the same for every application, made once."""
    made: dict[str, Any] = {}

    def get(**options: Any) -> dict[str, Any]:
        if not made:
            made.update(get_openapi(**options))
        return copy.deepcopy(made)

    return get


@pytest.fixture
def refusal(ottava: Command, monkeypatch: pytest.MonkeyPatch, document: Callable[..., dict[str, Any]]) -> Refusal:
    """The one line that a refused command says. The engine runs in this process, where it is refused sooner.

    What takes a server most of its start, and says nothing, is left out: its document, and a collection of garbage.
    """
    monkeypatch.setattr("fastapi.applications.get_openapi", document)
    monkeypatch.setattr("service.web.server.settle", lambda: None)
    for name, value in {"IN_PROCESS": "true", "PORT": "0", "LOG_LEVEL": "error"}.items():
        monkeypatch.setenv(f"OTTAVA_{name}", value)

    def run(*arguments: object) -> str:
        code, out, err = ottava(*arguments)
        assert code == 1, err
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def copy_of_tiny(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "copy")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "quick", "brown", "fox", "hello", "world", "naïve", "tokens,"]
    path.write_text(" ".join(words[(i * i + i // 7) % 8] for i in range(1200)), encoding="utf-8")
    return path


def test_version(ottava: Command) -> None:
    assert ottava("--version") == (0, f"ottava {__version__}\n", "")


@pytest.mark.parametrize("command", [[], ["serve"], ["quantize"], ["evaluate"]], ids=str)
def test_help_works_and_names_every_option(ottava: Command, command: list[str]) -> None:
    code, out, err = ottava(*command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: ottava" in out
    wanted = {
        "": ["serve", "quantize", "evaluate", "--version"],
        "serve": [
            "--host",
            "--port",
            "--variants",
            "--baseline",
            "--random-weights",
            "--kv-cache-bytes",
            "--kv-cache ",
        ],
        "quantize": ["--scheme", "--alpha", "--kv-cache", "--calibration", "model", "out"],
        "evaluate": ["--schemes", "--text", "--choices", "--layers", "--json", "--plot", "--windows", "--kv-cache"],
    }["".join(command)]
    assert [word for word in wanted if word not in out.lower()] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["serve", "--no-such-option"],
        ["serve", "--port", "eighty"],
        ["quantize"],
        ["quantize", "model"],
        ["evaluate", "--windows", "0"],
        ["evaluate", "--window-len", "1"],
    ],
    ids=" ".join,
)
def test_a_wrong_usage_exits_with_2_and_no_traceback(ottava: Command, arguments: list[str]) -> None:
    code, out, err = ottava(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: ottava" in err
    assert "Traceback" not in err


COMMANDS: dict[str, Callable[[Path | str, Path], Sequence[object]]] = {
    "serve": lambda model, _: ["serve", model],
    "quantize": lambda model, out: ["quantize", model, out / "out"],
    "evaluate": lambda model, _: ["evaluate", model, "--windows", 1, "--window-len", 16],
}


@pytest.fixture(params=COMMANDS)
def refused_model(request: pytest.FixtureRequest, refusal: Refusal, tmp_path: Path) -> Callable[[Path | str], str]:
    """What a command says of a model that it must not take."""
    return lambda model: refusal(*COMMANDS[request.param](model, tmp_path))


def test_no_folder(refused_model: Callable[[Path | str], str], tmp_path: Path) -> None:
    assert refused_model(tmp_path / "none") == (
        f"{tmp_path}/none is not a folder; name a model folder or a Hugging Face id such as owner/model"
    )


def test_an_id_that_cannot_be_fetched(refused_model: Callable[[Path | str], str]) -> None:
    assert "owner/model is neither a folder nor a model that can be fetched" in refused_model("owner/model")


@pytest.mark.parametrize("name", ["[/bold]", "[red]", "[/no"])
def test_brackets_in_a_name_are_shown_as_they_are(refusal: Refusal, tmp_path: Path, name: str) -> None:
    assert f"{tmp_path}/{name} is not a folder" in refusal("serve", tmp_path / name)


def test_a_folder_without_a_config(refused_model: Callable[[Path | str], str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused_model(tmp_path / "empty") == f"{tmp_path}/empty is not a model folder: it has no config.json"


@pytest.mark.parametrize("content", ["{", "[]", "", "\xff"])
def test_a_config_that_is_no_json_object(
    refused_model: Callable[[Path | str], str], copy_of_tiny: Path, content: str
) -> None:
    (copy_of_tiny / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refused_model(copy_of_tiny)


def test_a_family_that_is_not_served(refused_model: Callable[[Path | str], str], copy_of_tiny: Path) -> None:
    (copy_of_tiny / "config.json").write_text('{"model_type": "bert", "vocab_size": 340}')
    families = ", ".join(FAMILIES)
    where = copy_of_tiny / "config.json"
    assert refused_model(copy_of_tiny) == f"{where}: model family 'bert' is not served; the families are {families}"


@pytest.mark.parametrize("content", ['{"model_type": "no-such-family"}', '{"hidden_size": 5}'])
def test_a_family_that_nobody_knows(
    refused_model: Callable[[Path | str], str], copy_of_tiny: Path, content: str
) -> None:
    (copy_of_tiny / "config.json").write_text(content)
    assert "config.json cannot be read" in refused_model(copy_of_tiny)


def test_pickled_weights_alone(refused_model: Callable[[Path | str], str], copy_of_tiny: Path) -> None:
    (copy_of_tiny / "model.safetensors").rename(copy_of_tiny / "pytorch_model.bin")
    assert "holds pickled weights (pytorch_model.bin), which can run code when read" in refused_model(copy_of_tiny)


def test_no_weights(refused_model: Callable[[Path | str], str], copy_of_tiny: Path) -> None:
    (copy_of_tiny / "model.safetensors").unlink()
    assert refused_model(copy_of_tiny) == f"{copy_of_tiny} holds no safetensors weights"


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 100_000])
def test_truncated_weights(refused_model: Callable[[Path | str], str], copy_of_tiny: Path, num_bytes: int) -> None:
    weights = copy_of_tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    assert re.search(
        r"model\.safetensors is not a whole safetensors file .* download it again", refused_model(copy_of_tiny)
    )


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_a_missing_tensor(refused_model: Callable[[Path | str], str], copy_of_tiny: Path, name: str) -> None:
    change_tensors(copy_of_tiny, {name: None})
    assert refused_model(copy_of_tiny) == f"{copy_of_tiny} has no tensor {name}; is it a checkpoint of this model?"


def test_no_tokenizer(refusal: Refusal, copy_of_tiny: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy_of_tiny / name).unlink()
    assert "tokenizer" in refusal("serve", copy_of_tiny)
    assert "tokenizer" in refusal("evaluate", copy_of_tiny, "--windows", 1, "--window-len", 16)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite(
    refused_model: Callable[[Path | str], str], copy_of_tiny: Path, value: str
) -> None:
    change_tensors(copy_of_tiny, {"model.norm.weight": torch.full((192,), float(value))})
    assert "holds NaN or infinite values" in refused_model(copy_of_tiny)


@pytest.mark.parametrize("command", ["serve", "quantize"])
def test_an_unknown_scheme(refusal: Refusal, tiny_folder: Path, tmp_path: Path, command: str) -> None:
    said = refusal(*COMMANDS[command](tiny_folder, tmp_path), "--scheme", "int4")
    assert "'int4'" in said
    assert "choose one of" in said
    assert all(name in said for name in INT8)


def test_an_unknown_scheme_among_others(refusal: Refusal, tiny_folder: Path) -> None:
    assert "unknown scheme 'w4a16'; choose one of fp16, rtn" in refusal(
        "evaluate", tiny_folder, "--schemes", "rtn,w4a16"
    )


def test_a_float_scheme_leaves_nothing_to_quantize(refusal: Refusal, tiny_folder: Path, tmp_path: Path) -> None:
    assert "is float: there is nothing to quantize" in refusal(
        "quantize", tiny_folder, tmp_path / "o", "--scheme", "fp16"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--dtype", "float8", "dtype = 'float8'"),
        ("--device", "tpu", "device = 'tpu'"),
        ("--alpha", "1.5", "alpha = 1.5"),
        ("--alpha", "nan", "alpha = nan"),
        ("--port", "65536", "port = 65536"),
        ("--variants", "w4a4", "variants = 'w4a4'"),
        ("--variants", "fp16,fp16", "named twice"),
        ("--max-num-requests", "0", "max_num_requests = 0"),
        ("--max-model-len", "100000", "max_model_len 100000 exceeds the 256 positions"),
        ("--kv-cache-bytes", "1000", "lower max_model_len or raise kv_cache_bytes"),
        ("--kv-cache", "int4", "kv_cache = 'int4': Input should be 'auto', 'float' or 'int8'"),
        ("--log-level", "loud", "log_level = 'loud'"),
        ("--calibration", "/no/such/text", "/no/such/text cannot be read"),
        ("--baseline", "/no/such/model", "/no/such/model is not a folder"),
    ],
)
def test_a_bad_value_is_told_by_name(
    refusal: Refusal, tiny_folder: Path, option: str, value: str, complaint: str
) -> None:
    assert complaint in refusal("serve", tiny_folder, option, value)


def test_an_int8_cache_of_the_baseline_is_refused_with_the_remedy(refusal: Refusal, tiny_folder: Path) -> None:
    said = refusal("serve", tiny_folder, "--variants", "fp16", "--kv-cache", "int8")
    assert "kv_cache is 'int8' and variants is fp16" in said
    assert "add w8a8 to variants" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_variable_is_told_with_the_nearest(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path, command: str
) -> None:
    monkeypatch.setenv("OTTAVA_MAX_MODEL_LENGTH", "64")
    assert "OTTAVA_MAX_MODEL_LENGTH; the nearest known one is OTTAVA_MAX_MODEL_LEN" in refusal(
        *COMMANDS[command](tiny_folder, tmp_path)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_cuda_where_there_is_none(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path, command: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU is visible here" in refusal(*COMMANDS[command](tiny_folder, tmp_path), "--device", "cuda")


def test_alpha_outside_its_range(refusal: Refusal, tiny_folder: Path, tmp_path: Path) -> None:
    assert "alpha = 2.0: Input should be less than or equal to 1" in refusal(
        "quantize", tiny_folder, tmp_path / "out", "--alpha", 2
    )


def made_of(scheme: Scheme) -> Scheme:
    """What a preset becomes for a model whose prompts begin with token 1."""
    return scheme.with_sink([1] if scheme.shares_activation_scales else [])


@pytest.mark.parametrize("scheme", INT8)
def test_quantize_writes_a_folder_that_serves(
    ottava: Command, tiny_folder: Path, text: Path, tmp_path: Path, scheme: str
) -> None:
    out = tmp_path / "deep" / scheme
    code, said, err = ottava("quantize", tiny_folder, out, "--scheme", scheme, "--calibration", _long(text, tmp_path))
    assert (code, err) == (0, "")
    told, *notes = said.splitlines()
    assert told == f"{out}: {scheme}, {made_of(PRESETS[scheme]).describe()}"
    assert all(note.startswith("note: ") for note in notes)
    checkpoint = Checkpoint.open(out, torch.float32, "cpu")
    assert checkpoint.scheme_name == scheme
    linear = checkpoint.linear("model.layers.0.mlp.down_proj", 192, 160, has_bias=False)
    assert int8_of(linear).input_codes.kind == PRESETS[scheme].of_down().activation
    assert [path.name for path in out.parent.iterdir()] == [scheme]


def _long(text: Path, folder: Path) -> Path:
    """Enough of the text for the 32 windows of 512 tokens that static scales read."""
    path = folder / "long.txt"
    path.write_text(text.read_text(encoding="utf-8") * 16, encoding="utf-8")
    return path


def test_quantize_takes_alpha(ottava: Command, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, _ = ottava("quantize", tiny_folder, out, "--alpha", 0.25, "--seed", 3)
    assert code == 0
    assert "alpha 0.25" in said
    notes = json.loads((out / "ottava.json").read_text())
    assert notes["alpha"] == 0.25
    assert notes["calibration"].endswith("seed 3")


def test_quantize_stores_what_the_cache_is(ottava: Command, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    for kv_cache in ("int8", "auto"):
        out = tmp_path / kv_cache
        arguments = "--kv-cache", kv_cache, "--calibration", _long(text, tmp_path)
        code, said, _ = ottava("quantize", tiny_folder, out, *arguments)
        assert code == 0
        assert ("int8 keys and values" in said) == (kv_cache == "int8")
    assert Checkpoint.open(tmp_path / "int8", torch.float32, "cpu").schemes == (PRESETS["w8a8"].with_kv("int8"),)
    assert Checkpoint.open(tmp_path / "auto", torch.float32, "cpu").schemes == (PRESETS["w8a8"],)


@pytest.mark.parametrize(
    ("scheme", "family", "note"),
    [
        ("w8a8", "llama", None),
        ("rtn-token", "gpt_neox", None),
        ("rtn", "gpt_neox", "others compute the first token of a text in int8"),
        ("rtn-dynamic", "llama", "vLLM has no loader for activations with one scale per step"),
        ("zeroquant", "llama", "vLLM has no loader for int8 weights with scales per group"),
        ("llm-int8", "llama", "others serve it as rtn-token"),
        ("rtn-token", "gpt2", "transformers does not load gpt2 in int8"),
        ("rtn-token", "qwen3_moe", "transformers does not load qwen3_moe in int8"),
    ],
)
def test_quantize_tells_who_else_loads_it(
    ottava: Command, tmp_path: Path, scheme: str, family: str, note: str | None
) -> None:
    """And nothing more: transformers loads what is not named, and computes what it should."""
    source = save_tiny_model(tmp_path / "model", family)
    code, said, _ = ottava("quantize", source, tmp_path / "out", "--scheme", scheme, "--calibration-windows", 1)
    assert code == 0
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]
    if note is not None and ("transformers" in note or "first token" in note):
        return
    theirs, floats = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tmp_path / "out", source))
    with torch.inference_mode():
        found, expected = (model(torch.arange(40)[None]).logits for model in (theirs, floats))
    assert (found - expected).norm() < 0.3 * expected.norm()


def test_a_folder_that_is_not_empty_is_left_alone(refusal: Refusal, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    assert "exists and is not empty" in refusal("quantize", tiny_folder, tmp_path)
    assert "exists and is not empty" in refusal("quantize", tiny_folder, tmp_path / "precious.txt")
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_a_place_that_cannot_be_written_is_told(refusal: Refusal, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in refusal("quantize", tiny_folder, tmp_path / "file" / "out")


def test_a_quantized_model_is_neither_quantized_nor_evaluated_again(
    ottava: Command, refusal: Refusal, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert ottava("quantize", tiny_folder, out)[0] == 0
    assert "quantized already" in refusal("quantize", out, tmp_path / "again")
    assert "quantized already" in refusal("evaluate", out, "--windows", 1, "--window-len", 16)
    assert "name the float model with --baseline" in refusal("evaluate", out, "--windows", 1, "--window-len", 16)
    assert "name the float model with --baseline" in refusal("serve", out)


SMALL = ("--windows", 3, "--window-len", 64, "--calibration-windows", 2, "--dtype", "float32")


@pytest.fixture
def evaluated(ottava: Command, tiny_folder: Path, text: Path, tmp_path: Path) -> Evaluated:
    """What `ottava evaluate` writes and prints: the run, the rows, and stdout."""

    def run(*arguments: object) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
        out = tmp_path / "result.json"
        code, said, err = ottava("evaluate", tiny_folder, "--text", text, *SMALL, "--json", out, *arguments)
        assert (code, err) == (0, "")
        result = json.loads(out.read_text())
        return result["run"], result["rows"], said

    return run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    asked = [
        {"question": "the quick brown", "choices": ["fox", "hello world", "naïve"], "answer": i % 3} for i in range(3)
    ]
    path.write_text("\n".join(json.dumps(question) for question in asked))
    return path


MEASURED = {
    *("scheme", "perplexity", "perplexity_ratio", "kl", "top1_agreement", "num_tokens"),
    *("weight_bytes", "kv_bytes_per_token", "tokens_per_s", "num_questions"),
    *("perplexity_ratio_interval", "kl_interval"),
}


def test_evaluate_writes_rows_for_every_preset(evaluated: Evaluated) -> None:
    run, rows, said = evaluated()
    assert [row["scheme"] for row in rows] == [made_of(scheme).label for scheme in PRESETS.values()]
    assert {frozenset(row) for row in rows} == {frozenset(MEASURED)}
    assert {row["num_tokens"] for row in rows} == {3 * 63}
    assert (rows[0]["kl"], rows[0]["top1_agreement"], rows[0]["perplexity_ratio"]) == (0, 1, 1)
    assert all(row["perplexity"] > 1 and 0 <= row["kl"] < 1 and 0 < row["top1_agreement"] <= 1 for row in rows)
    for row in rows:
        assert row["perplexity_ratio"] == row["perplexity"] / rows[0]["perplexity"]
        assert row["tokens_per_s"] > 0
        assert (row["weight_bytes"] < 0.7 * rows[0]["weight_bytes"]) == (row["scheme"] != "fp16")
    kl = {row["scheme"]: row["kl"] for row in rows}
    assert 0 < kl["w8a8"] < kl["rtn, sink"]
    assert all(name in said for name in PRESETS)
    assert run["command"].startswith("ottava evaluate ")
    assert {"date", "device", "ottava", "torch", "triton", "transformers", "python", "threads"} < set(run)
    assert (run["dtype"], run["windows"], Path(run["text"]).name) == ("float32", [3, 64], "text.txt")


def test_evaluate_is_repeatable_and_takes_a_list(evaluated: Evaluated) -> None:
    arguments = ("--schemes", "w8a8, rtn,w8a8")
    first, second = (evaluated(*arguments)[1] for _ in range(2))
    assert [row["scheme"] for row in first] == ["fp16", "w8a8", "rtn, sink"]
    assert [row | {"tokens_per_s": 0} for row in first] == [row | {"tokens_per_s": 0} for row in second]


def test_evaluate_measures_an_int8_cache_and_names_it(evaluated: Evaluated) -> None:
    rows = {kv: evaluated("--schemes", "fp16,w8a8", "--kv-cache", kv)[1] for kv in ("float", "int8", "both")}
    assert [row["scheme"] for row in rows["int8"]] == ["fp16", "w8a8, int8 KV"]
    assert rows["int8"][0]["perplexity"] == rows["float"][0]["perplexity"]
    assert rows["int8"][1]["perplexity"] != rows["float"][1]["perplexity"]
    assert 0 < rows["int8"][1]["kl"] < 2 * rows["float"][1]["kl"]
    assert rows["int8"][1]["kv_bytes_per_token"] < 0.5 * rows["float"][1]["kv_bytes_per_token"]
    # Both in turn are what each is alone.
    apart = [rows["float"][0], rows["float"][1], rows["int8"][1]]
    assert [row["kl"] for row in rows["both"]] == [row["kl"] for row in apart]
    assert [row["scheme"] for row in rows["both"]] == ["fp16", "w8a8", "w8a8, int8 KV"]


def test_evaluate_measures_an_int8_head_beside_the_float_one(evaluated: Evaluated) -> None:
    rows = evaluated("--schemes", "fp16,w8a8", "--quantize-head")[1]
    assert [row["scheme"] for row in rows] == ["fp16", "w8a8", "w8a8, int8 head"]
    assert rows[2]["kl"] != rows[1]["kl"]
    assert 0 < rows[2]["kl"] < 3 * rows[1]["kl"]


def test_evaluate_measures_a_folder_that_is_quantized_already(
    ottava: Command, refusal: Refusal, evaluated: Evaluated, tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    """As it is, against the float model that is named; its scheme and calibration are read from the folder."""
    assert ottava("quantize", tiny_folder, tmp_path / "int8", "--scheme", "w8a8-static")[0] == 0
    stored = ("evaluate", tmp_path / "int8", "--baseline", tiny_folder, "--text", text, *SMALL)
    code, said, err = ottava(*stored, "--kv-cache", "both", "--layers", "--json", tmp_path / "stored.json")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "stored.json").read_text())
    assert [row["scheme"] for row in result["rows"]] == ["fp16", "w8a8-static, sink", "w8a8-static, sink, int8 KV"]
    assert (result["run"]["model"], result["run"]["baseline"]) == (str(tmp_path / "int8"), str(tiny_folder))
    assert result["run"]["calibration"].endswith("text that the model wrote itself, seed 0")
    again = evaluated("--schemes", "fp16")[1]
    assert result["rows"][0]["perplexity"] == again[0]["perplexity"]
    assert 0 < result["rows"][1]["kl"] < 1
    assert len(result["rows"][1]["linear_errors"]) == 2 * 7
    assert said.count("w8a8-static, sink: perplexity") == 1
    assert "measured as it is" in refusal(*stored, "--schemes", "w8a8")
    assert "measured as it is" in refusal(*stored, "--alpha", 0.5)
    assert "not quantized; leave it out" in refusal("evaluate", tiny_folder, "--baseline", tiny_folder, *SMALL)
    other = save_tiny_model(tmp_path / "other", vocab_size=352)
    assert "not one model" in refusal("evaluate", tmp_path / "int8", "--baseline", other, "--text", text, *SMALL)
    (tmp_path / "int8" / "ottava.json").unlink()
    assert "leave --layers out" in refusal(*stored, "--layers")


def test_evaluate_tells_each_row_as_soon_as_it_is_known(
    ottava: Command, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, text: Path
) -> None:
    """A scheme that fails takes only itself along."""

    def failing(*_: object, **__: object) -> None:
        raise InvalidSettings("no int8 today")

    monkeypatch.setattr("service.tools.evaluate.quality.quantize_model", failing)
    code, said, err = ottava("evaluate", tiny_folder, "--text", text, *SMALL)
    assert (code, "no int8 today" in err) == (1, True)
    assert re.match(r"fp16: perplexity \d+\.\d\d \(\+0\.00%\), KL 0\.0000 nats, top-1 agreement 100\.0%", said)


def test_evaluate_prints_a_table(evaluated: Evaluated, questions: Path) -> None:
    said = evaluated("--schemes", "w8a8")[2]
    headings = (
        "fp16",
        "w8a8",
        "perplexity",
        "vs. float",
        "KL (nats)",
        "tokens/s",
        "189 tokens",
        "decode of one request",
    )
    assert [word for word in headings if word not in said] == []
    assert "choices" not in said
    assert "choices" in evaluated("--schemes", "fp16", "--choices", questions)[2]


def test_evaluate_asks_questions(evaluated: Evaluated, questions: Path) -> None:
    baseline, w8a8 = evaluated("--schemes", "w8a8", "--choices", questions)[1]
    # The same question three times, each time with another answer: one of them is right.
    assert baseline["choice_accuracy"] == w8a8["choice_accuracy"] == 1 / 3
    assert baseline["choice_agreement"] == 1
    assert w8a8["choice_agreement"] in (0, 1)
    assert baseline["num_questions"] == w8a8["num_questions"] == 3


def test_evaluate_refuses_questions_that_cannot_be_asked(
    refusal: Refusal, tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    arguments = ("evaluate", tiny_folder, "--text", text, *SMALL, "--choices", path)
    assert f"{path} cannot be read" in refusal(*arguments)
    path.write_text('{"question": "a", "choices": ["b", "c"], "answer": 2}')
    assert refusal(*arguments) == f"{path}, line 1: answer = 2 must be the index of a choice, 0 to 1"
    path.write_text(json.dumps({"question": "quick " * 400, "choices": ["b", "c"], "answer": 1}))
    assert "more than 256; shorten it" in refusal(*arguments)


def test_evaluate_lists_layers(evaluated: Evaluated) -> None:
    baseline, rtn, with_kv = evaluated("--schemes", "rtn", "--layers", "--kv-cache", "both")[1]
    assert set(baseline) == MEASURED
    assert len(rtn["linear_errors"]) == 2 * 7
    errors = [linear["error"] for linear in rtn["linear_errors"]]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 1
    assert with_kv["linear_errors"] == rtn["linear_errors"]
    assert len(rtn["hidden_errors"]) == 2
    assert all(0 < error < 1 for error in rtn["hidden_errors"])
    assert with_kv["hidden_errors"] != rtn["hidden_errors"]
    said = " ".join(evaluated("--schemes", "rtn", "--layers")[2].split())
    assert f"rtn, sink: {rtn['linear_errors'][0]['name']} hurts most: its int8 output is {errors[0]:.2%} off" in said
    assert "The hidden states' error grows most in layer" in said


def test_evaluate_compares_layers_of_a_rotated_model_in_the_float_models_basis(evaluated: Evaluated) -> None:
    """In its own every state would be off by more than its length; and behind its sink."""
    plain = evaluated("--schemes", "rtn-token", "--layers")[1][1]
    turned = evaluated("--schemes", "rtn-token", "--rotate", "--sink", "on", "--layers")[1][1]
    assert turned["scheme"] == "rtn-token, rotated, sink"
    assert len(turned["linear_errors"]) == 2 * 7
    for kind in (lambda row: row["hidden_errors"], lambda row: [linear["error"] for linear in row["linear_errors"]]):
        assert 0 < max(kind(turned)) < 2 * max(kind(plain))


def test_evaluate_draws_a_plot(evaluated: Evaluated, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    evaluated("--schemes", "rtn,w8a8", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 10_000


def test_evaluate_refuses_files_that_it_could_not_write(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    """Before anything is measured."""
    monkeypatch.setattr("service.tools.evaluate.evaluation.measure_quality", None)
    evaluate = ("evaluate", tiny_folder, *SMALL)
    for option in ("--json", "--plot"):
        for path in (tmp_path, tmp_path / "none" / "out.png"):
            assert refusal(*evaluate, option, path) == (
                f"{option} {path} cannot be written: name a file in a folder that exists"
            )
    assert refusal(*evaluate, "--plot", tmp_path / "plot.pdf").endswith(
        "plot.pdf must end in .png: a PNG is what is drawn"
    )
    monkeypatch.setattr("service.tools.evaluate.evaluation.find_spec", lambda name: None)
    assert refusal(*evaluate, "--plot", tmp_path / "plot.png") == (
        "--plot needs matplotlib, which is not installed: pip install 'ottava[plot]', or leave --plot out"
    )


def test_the_service_imports_no_matplotlib() -> None:
    code = "import sys, service.cli; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_evaluate_calibrates_on_what_it_does_not_measure(
    ottava: Command, refusal: Refusal, tiny_folder: Path, text: Path
) -> None:
    """From one file both parts must fit: 3 windows measured and 2 read on behind them."""
    arguments = ("evaluate", tiny_folder, "--schemes", "w8a8", "--text", text, "--calibration", text)
    assert ottava(*arguments, *SMALL)[0] == 0
    counted = re.search(r"it has (\d+)", refusal(*arguments, *SMALL, "--windows", 999))
    assert counted is not None
    num_tokens = int(counted[1])
    said = refusal(*arguments, *SMALL, "--windows", num_tokens // 64)
    assert "windows of 64 after" in said


@pytest.mark.parametrize("case", ["same", "relative", "link", "copy", "none", "self-written"])
def test_no_window_is_both_calibrated_on_and_measured(
    ottava: Command, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path, case: str
) -> None:
    """Whatever the two are called; without either, a model too large to write its own text reads the help topics."""
    read: dict[str, Any] = {}

    def measured(folder: Path, schemes: Any, windows: Any, calibration: Calibration, *_: Any, **__: Any) -> list[Any]:
        read["measured"], read["calibrated"] = windows, calibration_windows(folder, calibration, torch.device("cpu"))
        raise InvalidSettings("seen")

    monkeypatch.setattr("service.tools.evaluate.evaluation.measure_quality", measured)
    if case == "none":
        monkeypatch.setattr("service.store.calibration.SELF_WRITTEN_MAX_BYTES", 0)
    monkeypatch.chdir(tmp_path)
    text, rng = tmp_path / "same.txt", random.Random(0)
    text.write_text(" ".join(rng.choice(["the", "quick", "fox", "hello"]) for _ in range(1200)), encoding="utf-8")
    (tmp_path / "link.txt").symlink_to(text)
    (tmp_path / "copy.txt").write_bytes(text.read_bytes())
    given = Path("same.txt") if case == "relative" else tmp_path / f"{case}.txt"
    options = ("--text", text, "--calibration", given) if case not in ("none", "self-written") else ()
    ottava("evaluate", tiny_folder, *SMALL, *options)
    pairs = [(a, b) for a in read["measured"].tolist() for b in read["calibrated"].tolist()]
    assert not [a for a, b in pairs if a == b]


def test_evaluate_refuses_windows_beyond_the_context(refusal: Refusal, tiny_folder: Path) -> None:
    assert "exceeds the 256 positions" in refusal("evaluate", tiny_folder, "--windows", 1, "--window-len", 300)


def test_a_text_that_is_too_short_or_unreadable(refusal: Refusal, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    evaluate = ("evaluate", tiny_folder, *SMALL, "--text")
    assert "too short" in refusal(*evaluate, tmp_path / "short.txt")
    assert "cannot be read" in refusal(*evaluate, tmp_path / "latin.txt")
    assert "cannot be read" in refusal(*evaluate, tmp_path / "none.txt")
    assert "too short" in refusal("quantize", tiny_folder, tmp_path / "o", "--calibration", tmp_path / "short.txt")


def until_ready(served: dict[str, Any]) -> Callable[[FastAPI, Settings], int]:
    """A `server.run` that opens the app's engines, in their own process, and closes them again."""

    async def go(application: FastAPI) -> None:
        async with application.router.lifespan_context(application):
            host = application.state.serving.host
            await until(lambda: host.stage is None or host.failed.is_set(), 120)
            served["refused"] = host.refused
            served["process"] = host._link._process
            assert served["process"].returncode is None

    def run(application: FastAPI, settings: Settings) -> int:
        served.update(application=application, settings=settings)
        asyncio.run(go(application))
        return 7

    return run


def test_serve_shows_what_it_serves_and_stops_its_engines(
    ottava: Command, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    served: dict[str, Any] = {}
    monkeypatch.setattr("service.web.server.run", until_ready(served))
    code, out, err = ottava("serve", tiny_folder, "--port", 8123, "--max-model-len", 64)
    assert (code, out) == (7, "")
    assert (served["settings"].host, served["settings"].port) == ("127.0.0.1", 8123)
    assert served["refused"] == {}
    assert list(served["application"].state.serving.engines) == ["w8a8", "fp16"]
    assert served["process"].returncode == 0
    said = re.sub(r"[\s│]+", " ", err)
    for words in (str(tiny_folder), "up to 64 tokens", "w8a8", "fp16", "http://127.0.0.1:8123/generate"):
        assert words in said
    paths = list(served["application"].openapi()["paths"])
    assert [path for path in paths if path not in said] == []


def test_serve_among_json_lines_is_a_json_line(
    ottava: Command, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setattr("service.web.server.run", until_ready({}))
    code, _, err = ottava("serve", tiny_folder, "--log-format", "json", "--variants", "fp16")
    lines = [json.loads(line) for line in err.splitlines()]
    assert code == 7
    assert {line["process"] for line in lines} <= {"web", "engine"}
    messages = [line["message"] for line in lines]
    assert "loading fp16" in messages
    (served,) = [line for line in lines if line["message"] == f"serving {tiny_folder} at http://127.0.0.1:8000"]
    assert list(served["info"]["variants"]) == ["fp16"]
    assert served["needs_key"] is False


def test_serve_refuses_keys_before_it_loads(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setattr("service.web.server.run", None)
    assert "there are no API keys" in refusal("serve", tiny_folder, "--host", "0.0.0.0")
    monkeypatch.setenv("OTTAVA_API_KEYS", "sh0rt")
    said = refusal("serve", tiny_folder)
    assert "8 to 512" in said
    assert "sh0rt" not in said


def test_serve_misses_what_traces_need_before_it_loads(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setattr("service.web.server.run", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "service.telemetry.spans", raising=False)
    assert "pip install 'ottava[otel]'" in refusal("serve", tiny_folder)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert "http/protobuf" in refusal("serve", tiny_folder)


@pytest.mark.parametrize("damage", ["none", "tensor"])
def test_a_process_says_one_line(copy_of_tiny: Path, tmp_path: Path, damage: str) -> None:
    """Nothing that a library prints or warns about at import or while loading comes between."""
    model = change_tensors(copy_of_tiny, {"model.norm.weight": None}) if damage == "tensor" else tmp_path / "none"
    done = subprocess.run(
        [sys.executable, "-m", "service", "quantize", str(model), str(tmp_path / "out")],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", PROGRESS.sub("", done.stderr))
