"""hypothesis on model folders: whatever is in them, loading refuses them in one line that names them, or serves them;
and one that is served answers with 200 or 4xx."""

from __future__ import annotations

import json
import math
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant.checkpoint.json_file import MAX_BYTES
from quant.scheme import PRESETS
from service.host.self_check import CHECK_PROMPTS
from service.store.calibration import Calibration
from service.store.quantized import quantize_model
from tests.support.fuzz import NUM_EXAMPLES, thorough
from tests.support.model_fuzz import DEEP, KINDS, answers, copied, hosted, reads_within, refused_or_served
from tests.support.tiny_models import change_tensors, save_tiny_model

FAMILIES = ["llama", "gpt2", "gemma2", "qwen3_moe", "phi3-longrope", "opt", "llama-yarn"]
MAX_GROWTH_BYTES = (1 << 30) + (NUM_EXAMPLES << 20)
"""Of this process, for models of 2 MB. What a claimed number of a file makes of them would be terabytes. Thousands of
models one after the other leave holes in the heap: 1,200 grow it by 0.5 GB, the last of them by 0.07 MB each."""

pytestmark = pytest.mark.usefixtures("one_thread")
Source = tuple[Path, str]
"""A folder, and the variant that it is served as."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    base = tmp_path_factory.mktemp("sources")
    floats = [(save_tiny_model(base / name, name), "fp16") for name in FAMILIES]
    quantize_model(floats[0][0], base / "int8", PRESETS["rtn-token"], Calibration(), torch.device("cpu"))
    return [*floats, (base / "int8", "w8a8")]


@pytest.fixture(scope="module", autouse=True)
def _memory_stays_bounded() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MAX_GROWTH_BYTES


# A hang ends the run: every example loads 2 MB and generates 15 tokens.
@pytest.mark.timeout(600 + NUM_EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_refused_in_one_line_or_served(kind: str, sources: list[Source]) -> None:
    @settings(thorough, max_examples=max(1, NUM_EXAMPLES // 2))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        source, variant = data.draw(st.sampled_from(sources))
        with tempfile.TemporaryDirectory() as name:
            folder = copied(source, Path(name) / "model")
            KINDS[kind](data.draw, folder)
            with reads_within(Path(name), source.parent):
                refused_or_served(folder, Path(name) / "cache", variant)

    check()


def outcome(source: Source, folder: Path) -> str:
    with reads_within(folder, folder.parent / "cache", source[0].parent):
        return refused_or_served(folder, folder.parent / "cache", source[1])


def test_a_whole_folder_is_served(sources: list[Source], tmp_path: Path) -> None:
    """The property is not empty: nothing of the unchanged folders is refused."""
    assert [outcome(source, copied(source[0], tmp_path / source[0].name)) for source in sources] == [""] * len(sources)


def with_config(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    """Change a JSON file of a copied folder, whose files are links."""
    path = folder / name
    content = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return folder


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"hidden_size": "192"}, "'hidden_size' expected int"),
        ("llama", {"hidden_size": 0}, "hidden_size is 0"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 10000"),
        ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
        ("llama", {"num_key_value_heads": 2}, "num_key_value_heads 2 does not divide num_attention_heads 3"),
        ("llama", {"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ("llama", {"head_dim": [1]}, "head_dim"),
        ("llama", {"vocab_size": 2**40}, "vocab_size is 1099511627776"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; a positive finite number"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
        ("llama", {"model_type": ["llama"]}, "model_type is ['llama']"),
        ("llama", {"model_type": ...}, "model_type is None"),
        ("llama", {"dtype": "no_such"}, "no_such"),
        ("llama", {"per_layer_config": {"0": {"hidden_size": 64}}}, "per_layer_config"),
        ("llama", {"rope_parameters": {"rope_type": False}}, "rope type False"),
        ("llama", {"rope_parameters": {"rope_theta": {}}}, "no angles follow from rope_parameters"),
        ("llama", {"rope_parameters": {"rope_theta": float("nan")}}, "not finite"),
        ("llama-yarn", {"rope_parameters": YARN | {"factor": "x"}}, "no angles follow from rope_parameters"),
        ("llama-yarn", {"rope_parameters": YARN | {"factor": 0.0}}, "rope_parameters"),
        ("phi3-longrope", {"original_max_position_embeddings": "x"}, "original_max_position_embeddings"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma2", {"layer_types": ["full_attention", []]}, "layer_types"),
        ("gemma2", {"sliding_window": -1}, "sliding_window is -1"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("gemma2", {"attn_logit_softcapping": -2.0}, "attn_logit_softcapping is -2.0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_experts 5"),
        ("llama", {"eos_token_id": {}}, "eos_token_id"),
        ("llama", {"eos_token_id": [[2]]}, "eos_token_id"),
    ],
)
def test_a_value_of_a_configuration_is_refused_by_name(
    family: str, changes: dict[str, Any], words: str, sources: list[Source], tmp_path: Path
) -> None:
    source = sources[FAMILIES.index(family)]
    assert words in outcome(source, with_config(copied(source[0], tmp_path / "model"), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 10**10, "id2label": None},
        {"n_inner": 7, "layer_norm_eps": "x", "attn_logit_softcapping": 1e-9},
        {"configuration_files": ["../config.99.0.0.json"], "auto_map": {"AutoConfig": "../other.Config"}},
    ],
    ids=["of a classifier", "of other families", "other files"],
)
def test_a_key_that_the_family_does_not_have_changes_nothing(
    changes: dict[str, Any], sources: list[Source], tmp_path: Path
) -> None:
    (tmp_path / "config.99.0.0.json").write_text("{}")
    assert outcome(sources[0], with_config(copied(sources[0][0], tmp_path / "model"), **changes)) == ""


@pytest.mark.parametrize("ids", [{}, [None], "<|end|>", [2.5], True])
def test_an_end_token_that_is_no_number(ids: Any, sources: list[Source], tmp_path: Path) -> None:
    folder = with_config(copied(sources[0][0], tmp_path / "model"), "generation_config.json", eos_token_id=ids)
    assert "generation_config.json: eos_token_id is" in outcome(sources[0], folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
)
@pytest.mark.parametrize("how", ["deep", "pipe", "huge"])
def test_a_file_that_no_reader_comes_to_an_end_with(name: str, how: str, sources: list[Source], tmp_path: Path) -> None:
    folder = copied(sources[0][0], tmp_path / "model")
    (folder / name).unlink()
    if how == "pipe":
        os.mkfifo(folder / name)
    elif how == "deep":
        text = b"[" * DEEP
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text if name == "model.safetensors" else text)
    else:
        (folder / name).touch()
        os.truncate(folder / name, 1 << 40)
    if how == "huge" and name == "tokenizer.json":
        pytest.skip("the tokenizers library reads it, of whatever size")
    line = outcome(sources[0], folder)
    # A pipe is no file, and these two may be left out.
    assert name.partition(".")[0] in line or (
        how == "pipe" and name in ("tokenizer_config.json", "generation_config.json")
    )


@pytest.mark.parametrize("place", ["..", ".", "", "../a.safetensors", "/etc/passwd", "a\0b", "\ud800", 1, None, []])
def test_an_index_that_points_elsewhere(place: Any, sources: list[Source], tmp_path: Path) -> None:
    folder = copied(sources[0][0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    index = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    line = outcome(sources[0], folder)
    assert "model.safetensors.index.json places 'model.norm.weight' in" in line
    assert "is not a file name of this folder" in line


@pytest.mark.parametrize("name", ["a\nb", "x" * 5000, "model.layers.0.mlp.up_proj.\n"])
def test_a_name_of_a_tensor_that_no_line_can_show(name: str, sources: list[Source], tmp_path: Path) -> None:
    source = sources[0]
    folder = Path(tmp_path / "model")
    folder.mkdir()
    for path in source[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    line = outcome(source, change_tensors(folder, {name: torch.ones(1)}))
    assert repr(name[:200]) in line


def test_a_tokenizer_that_makes_no_token_of_a_text(sources: list[Source], tmp_path: Path) -> None:
    folder = copied(sources[0][0], tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= {"vocab": {}, "merges": []}
    line = outcome(
        sources[0],
        with_config(folder, "tokenizer.json", model=content["model"], added_tokens=[], post_processor=None),
    )
    assert "makes no token of ordinary text" in line


def test_a_tokenizer_whose_code_panics(sources: list[Source], tmp_path: Path) -> None:
    """A panic of the library is no Exception: it ended the process that loaded the tokenizer."""
    folder = copied(sources[0][0], tmp_path / "model")
    processor = json.loads((folder / "tokenizer.json").read_text())["post_processor"] | {"special_tokens": {}}
    line = outcome(sources[0], with_config(folder, "tokenizer.json", post_processor=processor))
    assert "tokenizer.json: no usable tokenizer" in line


def test_a_decoder_that_panics_on_one_token(sources: list[Source], tmp_path: Path) -> None:
    """Of a token that is nothing but what is stripped from both its ends, the library takes less than nothing."""
    folder = copied(sources[0][0], tmp_path / "model")
    decoder = {"type": "Strip", "content": "x", "start": 1, "stop": 1}
    line = outcome(sources[0], with_config(folder, "tokenizer.json", decoder=decoder))
    assert "tokenizer.json: no usable tokenizer: " in line


def replace(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "z"}, "content": content}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("lengths", [(65,), (8, 9), (2, 1, 64)], ids=str)
def test_a_tokenizer_that_makes_much_of_little(
    sources: list[Source], tmp_path: Path, part: str, lengths: tuple[int, ...]
) -> None:
    """A few such rules make gigabytes of one letter."""
    folder = copied(sources[0][0], tmp_path / "model")
    rules = {"type": "Sequence", f"{part}s": [replace("z" * length) for length in lengths]}
    line = outcome(sources[0], with_config(folder, "tokenizer.json", **{part: rules}))
    assert f"its {part} puts {math.prod(lengths)} characters in place of one" in line
    assert "at most 64 are served" in line


def test_a_normalizer_that_makes_little_more(sources: list[Source], tmp_path: Path) -> None:
    folder = copied(sources[0][0], tmp_path / "model")
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    rules = {"type": "Sequence", "normalizers": [prepend, replace("zz"), {"type": "NFKC"}]}
    assert outcome(sources[0], with_config(folder, "tokenizer.json", normalizer=rules)) == ""


def test_a_tokenizer_larger_than_any(sources: list[Source], tmp_path: Path) -> None:
    """It would be read whole, into as much memory and more."""
    folder = copied(sources[0][0], tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert f"it has {MAX_BYTES + 1} bytes; at most {MAX_BYTES} are read" in outcome(sources[0], folder)


def test_a_text_that_the_tokenizer_fails_on(sources: list[Source], tmp_path: Path) -> None:
    """Its vocabulary has the letters of the prompts that a start tries, and no token for others."""
    folder = copied(sources[0][0], tmp_path / "model")
    letters = sorted(set("".join(CHECK_PROMPTS)))
    model = {"type": "WordLevel", "vocab": {letter: place for place, letter in enumerate(letters)}, "unk_token": "?"}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    changes = {"model": model, "pre_tokenizer": split, "post_processor": None, "added_tokens": [], "decoder": None}
    with_config(folder, "tokenizer.json", **changes)
    with hosted(folder, tmp_path / "cache", "fp16") as (host, settings_):
        bodies = [("/v1/completions", {"prompt": text, "max_tokens": 2}) for text in ("Spain", "日本")]
        (served, _), (refused, answer) = answers(host, settings_, bodies)
    assert (served, refused) == (200, 400)
    assert "the model's tokenizer fails on this text" in answer["error"]["message"]


def test_a_list_of_chat_templates_whose_names_are_no_texts(sources: list[Source], tmp_path: Path) -> None:
    folder = copied(sources[0][0], tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": {}, "template": "x"}, {"name": ["default"]}, 1, {"template": "x"}]
    assert outcome(sources[0], with_config(folder, "tokenizer_config.json", chat_template=templates)) == ""
