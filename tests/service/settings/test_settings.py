"""Settings: sources, bounds, and names that do not exist."""

import os
import re
from pathlib import Path
from typing import get_args

import pytest

import service
from service.errors import InvalidSettings
from service.settings import BASELINE, Settings, Variant, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("OTTAVA_"):
            monkeypatch.delenv(name)


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.model is None
    assert settings.variants == ("w8a8", "fp16")
    assert settings.cache_dir == Path("/somewhere/ottava")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert load_settings().cache_dir == Path.home() / ".cache" / "ottava"


def test_environment_then_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTTAVA_PORT", "9000")
    monkeypatch.setenv("OTTAVA_VARIANTS", "fp16, w8a8")
    monkeypatch.setenv("OTTAVA_CUDA_GRAPHS", "false")
    settings = load_settings(host=None, max_waiting=5)
    assert (settings.port, settings.variants, settings.cuda_graphs) == (9000, ("fp16", "w8a8"), False)
    assert (settings.host, settings.max_waiting) == ("127.0.0.1", 5)
    assert load_settings(port=1234, variants="fp16").variants == ("fp16",)


def test_the_cache_of_w8a8_alone_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [load_settings(kv_cache=value).kv for value in ("auto", "float", "int8")] == [None, "float", "int8"]
    assert load_settings(kv_cache="float", variants="fp16").kv == "float"
    monkeypatch.setenv("OTTAVA_KV_CACHE", "int8")
    assert load_settings().kv == load_settings(variants="w8a8").kv == "int8"


def test_an_unknown_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTTAVA_MAX_WAITNG", "5")
    with pytest.raises(InvalidSettings, match=r"OTTAVA_MAX_WAITNG.*OTTAVA_MAX_WAITING"):
        load_settings()


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(InvalidSettings, match=r"'blok_size'.*'block_size'"):
        load_settings(blok_size=16)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"port": 70000}, "port = 70000.*65535"),
        ({"block_size": 12}, "block_size = 12.*power of two"),
        ({"variants": ""}, "variants"),
        ({"variants": "int4"}, "variants.*'w8a8' or 'fp16'"),
        ({"variants": "fp16,fp16"}, "named twice"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dtype": "int8"}, "dtype.*float16"),
        ({"max_num_requests": 600, "max_batched_tokens": 512}, "max_batched_tokens is 512, below max_num_requests 600"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes"),
        ({"kv_cache": "int4"}, "kv_cache = 'int4'.*'auto', 'float' or 'int8'"),
        ({"quantize_head": True, "variants": "fp16"}, "quantize_head is true and variants is fp16.*add w8a8"),
        (
            {"speculate": "ngram", "max_num_requests": 1},
            "speculate is 'ngram' and max_num_requests is 1.*raise max_num",
        ),
        ({"speculate": "draft"}, "speculate = 'draft'.*'none' or 'ngram'"),
        ({"kv_cache": "int8", "variants": "fp16"}, "kv_cache is 'int8' and variants is fp16.*add w8a8 to variants"),
    ],
)
def test_impossible_values_are_told_in_one_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidSettings, match=words) as caught:
        load_settings(**values)
    assert "\n" not in caught.value.message


def test_every_field_has_a_reason_and_cannot_change() -> None:
    assert all(field.description for field in Settings.model_fields.values())
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1  # type: ignore[misc]  # it is frozen


def test_the_baseline_has_one_name() -> None:
    sources = {path: path.read_text() for path in Path(service.__file__).parent.rglob("*.py")}
    assert [path.name for path, text in sources.items() if re.search(r"^BASELINE\b.*=", text, re.M)] == ["settings.py"]
    assert BASELINE in get_args(Variant)


def test_steps_are_larger_on_a_gpu_unless_told_otherwise() -> None:
    assert Settings().step_tokens("cuda") > Settings().step_tokens("cpu") >= Settings().max_num_requests
    assert Settings(max_num_requests=4096).step_tokens("cpu") == 4096
    assert Settings(max_batched_tokens=300).step_tokens("cuda") == 300


def test_as_many_requests_as_a_small_step_has_tokens() -> None:
    assert [Settings(max_batched_tokens=tokens).max_num_requests for tokens in (1, 100, 300)] == [1, 100, 256]
    assert Settings(max_batched_tokens=100, max_num_requests=7).max_num_requests == 7
