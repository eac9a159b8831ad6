"""From settings to running engines on a tiny model: both variants, what /info says, the self-check, and refusals."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from quant.errors import CheckpointError
from quant.linear import Int8Linear
from quant.scheme import PRESETS, Scheme
from service.engine.api import SamplingParams
from service.engine.pacing import TARGET_S
from service.engine.shapes import Shape
from service.errors import InvalidSettings, StartupError, UnsupportedModel
from service.host.model_host import ModelHost
from service.host.reloader import open_host
from service.host.self_check import MAX_KL
from service.host.variants import target_s
from service.settings import Settings
from service.store.calibration import Calibration
from service.store.quantized import quantize_model, quantized_folder
from tests.support.eager import Eager
from tests.support.engines import collect
from tests.support.harness import app_over, client_of
from tests.support.narrowed import present
from tests.support.tiny_models import change_tensors, save_tiny_model

Asked = tuple[str, str, dict[str, object] | None]
"""Method, path and body."""

CPU = torch.device("cpu")
TEXT = Calibration(num_windows=2, window_len=32)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("float") / "tiny-llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, float_folder: Path) -> Path:
    """A cache in which the tiny model is quantized already, as `open_host` would do it."""
    folder = tmp_path_factory.mktemp("cache")
    quantized_folder(float_folder, PRESETS["w8a8"], Calibration(), folder, CPU)
    return folder


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: pytest.TempPathFactory, float_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("int8") / "tiny-w8a8"
    quantize_model(float_folder, out, PRESETS["w8a8"], TEXT, CPU)
    return out


@contextmanager
def hosted(model: Path, cache: Path, **changes: Any) -> Iterator[tuple[ModelHost, Settings]]:
    given: dict[str, Any] = {"dtype": "float32"} | changes
    settings = Settings(model=str(model), cache_dir=cache, device="cpu", **given)
    host = open_host(settings)
    try:
        yield host, settings
    finally:
        host.stop()


def ask(host: ModelHost, settings: Settings, *requests: Asked) -> list[httpx.Response]:
    """Answers of the real app over the host's engines, after its self-check."""

    async def go() -> list[httpx.Response]:
        app = app_over(host, settings, host.tokenizer)
        async with client_of(app) as client:
            return [await client.request(method, path, json=body) for method, path, body in requests]

    return asyncio.run(go())


def int8_linears(host: ModelHost) -> list[Int8Linear]:
    layers = host.variants["w8a8"].decoder.layers
    return [linear for layer in layers for linear in layer.linears if isinstance(linear, Int8Linear)]


def test_both_variants_serve_the_same_model(float_folder: Path, cache: Path) -> None:
    body: dict[str, object] = {"prompt": "hello world", "max_tokens": 5, "ignore_eos": True, "compare": True}
    with hosted(float_folder, cache) as (host, settings):
        ready, info, answer = ask(
            host, settings, ("GET", "/ready", None), ("GET", "/info", None), ("POST", "/generate", body)
        )
    assert ready.json() == {"ready": True, "variants": {"w8a8": "ready", "fp16": "ready"}}
    assert answer.status_code == 200
    assert len(answer.json()["token_ids"]) == len(answer.json()["baseline"]["token_ids"]) == 5
    assert (answer.json()["variant"], answer.json()["baseline"]["variant"]) == ("w8a8", "fp16")
    assert info.json()["model"] == str(float_folder)


def test_answers_with_drafts_are_those_without_and_the_drafts_are_counted(
    float_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []

    def eager(max_draft_tokens: int, max_rows: int, _: object) -> Eager:
        made.append((max_draft_tokens, max_rows))
        return Eager(max_draft_tokens, max_rows)

    monkeypatch.setattr("service.host.variants.Speculation", eager)
    # The bias makes the answers repeat themselves, whatever the type that this processor computes in.
    body: dict[str, object] = {"prompt": "hello world " * 20, "max_tokens": 60, "ignore_eos": True, "compare": True}
    body["logit_bias"] = {"40": 5}

    def told(speculate: str) -> tuple[list[list[int]], list[int], str]:
        limits = {"max_draft_tokens": 5, "max_num_requests": 32}
        with hosted(float_folder, cache, speculate=speculate, **limits) as (host, settings):
            answer, metrics = ask(host, settings, ("POST", "/generate", body), ("GET", "/metrics", None))
        found = [answer.json(), answer.json()["baseline"]]
        return [run["token_ids"] for run in found], [run["metrics"]["accepted_tokens"] for run in found], metrics.text

    (without, none, _), (with_it, accepted_of, metrics) = told("none"), told("ngram")
    assert with_it == without
    assert none == [0, 0]
    assert made == [(5, 32)] * 2, "one for each variant"
    for variant, accepted_of_run in zip(("w8a8", "fp16"), accepted_of, strict=True):
        drafts, accepted = (
            float(
                re.findall(rf'^ottava_speculative_{name}_tokens_total{{variant="{variant}"}} (.*)$', metrics, re.M)[0]
            )
            for name in ("draft", "accepted")
        )
        assert drafts >= accepted == accepted_of_run > 0, variant


@pytest.mark.parametrize("scheme", ["rtn-dynamic", "llm-int8"])
def test_a_scheme_whose_rows_depend_on_each_other_takes_no_drafts(
    float_folder: Path, tmp_path: Path, scheme: str
) -> None:
    words = "speculate is 'ngram', but the scheme of w8a8 rounds all rows of a step together"
    with (
        pytest.raises(InvalidSettings, match=words),
        hosted(float_folder, tmp_path, scheme=scheme, random_weights=True, speculate="ngram"),
    ):
        pass


def test_info_is_whole_and_is_json(float_folder: Path, cache: Path) -> None:
    with hosted(float_folder, cache, max_num_requests=8) as (host, _):
        info = asdict(host.info())
        weights = {name: variant.decoder.weight_bytes for name, variant in host.variants.items()}
    assert json.loads(json.dumps(info)) == info
    assert (info["family"], info["max_model_len"], info["gpu_memory_bytes"]) == ("llama", 256, None)
    assert all(isinstance(info["versions"][name], str) for name in ("ottava", "torch", "triton", "transformers"))
    assert isinstance(info["device"], str)
    assert info["device"]
    w8a8, fp16 = info["variants"]["w8a8"], info["variants"]["fp16"]
    assert list(info["variants"]) == ["w8a8", "fp16"]
    assert (w8a8["scheme"], w8a8["alpha"], w8a8["dtype"]) == ("w8a8", "search", "float32")
    assert w8a8["calibration"] == "4096 tokens of text that the model wrote itself, seed 0"
    assert w8a8["description"] == PRESETS["w8a8"].describe()
    assert (fp16["scheme"], fp16["alpha"], fp16["calibration"]) == ("fp16", None, None)
    assert fp16["description"] == PRESETS["fp16"].describe()
    for name, variant in info["variants"].items():
        assert variant["weight_bytes"] == weights[name] > 0
        # 2 layers of keys and values, 1 head of 64, float32: 1024 bytes a token, 16 blocks of 16 for each request.
        assert variant["kv_cache_bytes"] == 1024 * 256 * 8
        assert variant["max_num_requests"] == 8
    assert w8a8["weight_bytes"] < 0.6 * fp16["weight_bytes"]


# Of 2 layers, 1 head of 64, keys and values: 4 bytes an element, or 1 and 4 for the scale of a head.
FLOAT_BYTES, INT8_BYTES = 2 * 2 * 64 * 4, 2 * 2 * (64 + 4)


def test_the_target_of_steps_is_the_variants_own_unless_it_is_set(caplog: pytest.LogCaptureFixture) -> None:
    slow = {Shape(1, 1, is_decode=True): 0.01}
    with caplog.at_level(logging.INFO, "service.host.variants"):
        assert target_s("w8a8", slow, Settings()) == pytest.approx(0.04)
        assert target_s("w8a8", slow, Settings(target_itl_ms=12.5)) == pytest.approx(0.0125)
    assert [record.message for record in caplog.records] == [
        f"w8a8: prompts are read in steps of up to {told} ms beside answers" for told in ("40", "12.5")
    ]
    # Steps whose times are not known have no target.
    caplog.clear()
    assert target_s("w8a8", {}, Settings()) == TARGET_S
    assert not caplog.records


def test_an_int8_cache_is_the_int8_variant_s_alone(float_folder: Path, cache: Path) -> None:
    """It holds more tokens in the same memory; /info and /metrics say what it takes; the files in the cache serve."""
    body: dict[str, object] = {"prompt": "hello world", "max_tokens": 5, "ignore_eos": True, "compare": True}
    budget = FLOAT_BYTES * 256 * 3
    with hosted(float_folder, cache, kv_cache="int8", kv_cache_bytes=budget) as (host, settings):
        assert host.self_check() == {}
        info, metrics, answer = ask(
            host, settings, ("GET", "/info", None), ("GET", "/metrics", None), ("POST", "/generate", body)
        )
        num_blocks = {name: engine.stats().num_blocks for name, engine in host.engines.items()}
    assert len(list((cache / "quantized").glob("*.lock"))) == 1
    variants = info.json()["variants"]
    assert {name: variant["kv_cache_dtype"] for name, variant in variants.items()} == {
        "w8a8": "int8",
        "fp16": "float32",
    }
    assert variants["w8a8"]["description"] == PRESETS["w8a8"].with_kv("int8").describe()
    assert variants["fp16"]["description"] == PRESETS["fp16"].describe()
    for name, token_bytes in (("w8a8", INT8_BYTES), ("fp16", FLOAT_BYTES)):
        assert num_blocks[name] == budget // (64 * token_bytes)
        num_bytes = num_blocks[name] * 64 * token_bytes
        assert variants[name]["kv_cache_bytes"] == num_bytes <= budget
        assert f'ottava_kv_cache_bytes{{variant="{name}"}} {float(num_bytes)}' in metrics.text
    assert num_blocks["w8a8"] > 3.7 * num_blocks["fp16"]
    assert answer.status_code == 200
    assert len(answer.json()["token_ids"]) == 5


def test_a_folder_says_what_its_cache_is_unless_the_user_does(float_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8-kv"
    quantize_model(float_folder, out, PRESETS["w8a8"].with_kv("int8"), TEXT, CPU)
    for kv_cache, dtype in (("auto", "int8"), ("float", "float32"), ("int8", "int8")):
        with hosted(out, tmp_path, kv_cache=kv_cache, baseline=str(float_folder)) as (host, _):
            assert host.self_check() == {}
            info = asdict(host.info())["variants"]
        assert (info["w8a8"]["kv_cache_dtype"], info["fp16"]["kv_cache_dtype"]) == (dtype, "float32")
        assert ("keys and values" in info["w8a8"]["description"]) == (dtype == "int8")


def test_a_folder_of_another_tool_is_named_after_its_scales(
    float_folder: Path, int8_folder: Path, tmp_path: Path
) -> None:
    """Not after the settings' scheme, which it was not quantized by."""
    foreign = shutil.copytree(int8_folder, tmp_path / "foreign", ignore=shutil.ignore_patterns("ottava.json"))
    with hosted(foreign, tmp_path, scheme="smoothquant-o3", baseline=str(float_folder)) as (host, _):
        info = asdict(host.info())["variants"]
    scheme = Scheme("int8 channel/token", "channel", "token")
    assert (info["w8a8"]["scheme"], info["w8a8"]["alpha"]) == (scheme.name, None)
    assert info["w8a8"]["description"] == scheme.describe()
    assert info["fp16"]["scheme"] == "fp16"


def test_random_weights_take_an_int8_cache(float_folder: Path, tmp_path: Path) -> None:
    with hosted(float_folder, tmp_path, random_weights=True, kv_cache="int8", variants="w8a8") as (host, _):
        assert host.info().variants["w8a8"].kv_cache_dtype == "int8"
        assert host.self_check() == {}


def running_engines() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("engine-"))


def test_the_engines_end_with_their_host(float_folder: Path, cache: Path) -> None:
    assert running_engines() == []
    with hosted(float_folder, cache):
        assert running_engines() == ["engine-fp16", "engine-w8a8"]
    assert running_engines() == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sound_model_passes_the_self_check(float_folder: Path, cache: Path, dtype: str) -> None:
    with hosted(float_folder, cache, dtype=dtype) as (host, _):
        assert host.self_check() == {}
        assert {variant.engine.dtype for variant in host.variants.values()} == {dtype}


def test_the_self_check_fits_in_a_short_context(float_folder: Path, cache: Path) -> None:
    """The check's prompts have more tokens than this."""
    with hosted(float_folder, cache, max_model_len=8) as (host, _):
        assert host.self_check() == {}
        assert host.info().max_model_len == 8


@torch.inference_mode()
def _scramble(linear: Int8Linear) -> None:
    order = torch.randperm(linear.weight_q.numel(), generator=torch.Generator().manual_seed(0))
    linear.weight_q.copy_(linear.weight_q.flatten()[order].view_as(linear.weight_q).clone())
    linear.weight_scale.mul_(4)


def test_a_variant_that_disagrees_wildly_does_not_serve(float_folder: Path, cache: Path) -> None:
    requests: list[Asked] = [
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("POST", "/generate", {"prompt": "hello", "max_tokens": 2}),
        ("POST", "/generate", {"prompt": "hello", "max_tokens": 2, "variant": "fp16", "ignore_eos": True}),
    ]
    with hosted(float_folder, cache) as (host, settings):
        for linear in int8_linears(host):
            _scramble(linear)
        refused = host.self_check()
        health, ready, generate, baseline = ask(host, settings, *requests)
    assert list(refused) == ["w8a8"]
    divergence = float(refused["w8a8"].partition("mean KL divergence ")[2].split()[0])
    assert divergence > MAX_KL
    assert f"limit {MAX_KL}; quantize with another scheme" in refused["w8a8"]
    assert health.status_code == 200
    assert ready.status_code == 503
    assert ready.json() == {"ready": False, "variants": refused}
    assert generate.status_code == 503
    assert generate.headers["retry-after"]
    assert refused["w8a8"] in generate.json()["error"]["message"]
    assert baseline.status_code == 200


def test_a_variant_that_is_not_finite_does_not_serve(float_folder: Path, tmp_path: Path) -> None:
    """A tensor of an int8 checkpoint that makes its activations overflow, beside a sound baseline."""
    damaged = tmp_path / "damaged"
    quantize_model(float_folder, damaged, PRESETS["w8a8"], TEXT, CPU)
    change_tensors(damaged, {"model.layers.1.post_attention_layernorm.weight": torch.full((192,), 3e38)})
    with hosted(damaged, tmp_path / "cache", baseline=str(float_folder)) as (host, settings):
        assert host.self_check() == {"w8a8": "its logits for check prompt 0 are not finite"}
        ready, generate = ask(
            host, settings, ("GET", "/ready", None), ("POST", "/generate", {"prompt": "hello", "max_tokens": 2})
        )
    assert (ready.status_code, generate.status_code) == (503, 503)
    assert "not finite" in ready.json()["variants"]["w8a8"]
    assert "not finite" in generate.json()["error"]["message"]


def test_a_broken_baseline_refuses_both(float_folder: Path, int8_folder: Path, tmp_path: Path) -> None:
    """Nothing can be shown to agree with a baseline whose logits are NaN."""
    baseline = save_tiny_model(tmp_path / "baseline")
    change_tensors(baseline, {"model.norm.weight": torch.full((192,), 3e38)})
    with hosted(int8_folder, tmp_path / "cache", baseline=str(baseline)) as (host, _):
        refused = host.self_check()
    assert refused["fp16"] == "its logits for check prompt 0 are not finite"
    assert "mean KL divergence nan" in refused["w8a8"]


def test_without_a_baseline_a_variant_is_checked_for_finiteness_alone(int8_folder: Path, tmp_path: Path) -> None:
    with hosted(int8_folder, tmp_path, variants="w8a8") as (host, _):
        for linear in int8_linears(host):
            _scramble(linear)
        assert host.self_check() == {}
        host.variants["w8a8"].decoder.norm.weight = torch.full((192,), torch.inf)
        assert "not finite" in host.self_check()["w8a8"]


def test_a_quantized_model_needs_its_baseline_named(float_folder: Path, int8_folder: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidSettings, match=r"tiny-w8a8 is quantized, so .* --baseline, or serve --variants w8a8"),
        hosted(int8_folder, tmp_path),
    ):
        pass
    with hosted(int8_folder, tmp_path, baseline=str(float_folder)) as (host, _):
        assert host.self_check() == {}
        assert list(host.variants) == ["w8a8", "fp16"]
        assert present(host.info().variants["w8a8"].calibration).startswith("64 tokens")
    assert not (tmp_path / "quantized").exists()


def test_the_baseline_alone_needs_no_quantizing(float_folder: Path, tmp_path: Path) -> None:
    with hosted(float_folder, tmp_path, variants="fp16") as (host, _):
        assert host.self_check() == {}
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("changes", [{"max_model_len": 256}, {"max_model_len": 64, "block_size": 32}])
def test_a_cache_below_one_request_is_refused_with_the_remedy(
    float_folder: Path, cache: Path, changes: dict[str, int]
) -> None:
    with (
        pytest.raises(InvalidSettings, match=r"KV cache of w8a8 has .* lower max_model_len or raise kv_cache_bytes"),
        hosted(float_folder, cache, kv_cache_bytes=1024 * changes["max_model_len"] - 1, **changes),
    ):
        pass
    with hosted(float_folder, cache, kv_cache_bytes=1024 * changes["max_model_len"], **changes) as (host, _):
        assert host.variants["w8a8"].engine.stats().kv_cache_bytes == 1024 * changes["max_model_len"]


def test_requests_are_no_longer_than_a_cache_whose_size_was_asked_for(
    float_folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with hosted(float_folder, cache, kv_cache_bytes=1024 * 256 - 1) as (host, _):
        engine = host.engines["w8a8"]
        assert engine.max_model_len == 192
        assert engine.stats().num_blocks == 3
        prompt, params = [3 + i % 200 for i in range(190)], SamplingParams(2, ignore_eos=True)
        assert len(asyncio.run(collect(engine, prompt, params))) == 2
    assert "w8a8 takes requests of up to 192 tokens, which its KV cache of 0.25 MiB holds" in caplog.text
    assert "where its model takes 256: raise kv_cache_bytes, or set max_model_len" in caplog.text
    with pytest.raises(InvalidSettings, match="KV cache"), hosted(float_folder, cache, kv_cache_bytes=1024 * 64 - 1):
        pass


def test_a_refused_start_leaves_no_engine_running(
    float_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second variant finds no memory; the first must not go on."""
    budgets = iter([1024 * 256, 1])
    monkeypatch.setattr("service.host.model_host.cache_budget", lambda *_: next(budgets))
    with pytest.raises(InvalidSettings, match="KV cache of fp16"), hosted(float_folder, cache):
        pass
    assert running_engines() == []


@pytest.mark.parametrize("scheme", [name for name, preset in PRESETS.items() if preset.is_int8])
def test_random_weights_take_shapes_alone(float_folder: Path, tmp_path: Path, scheme: str) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((float_folder / name).read_bytes())
    body: dict[str, object] = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True}
    with hosted(tmp_path, tmp_path / "cache", random_weights=True, scheme=scheme) as (host, settings):
        info = asdict(host.info())["variants"]
        assert {info[name]["calibration"] for name in info} == {"random weights"}
        assert [info[name]["scheme"] for name in info] == [scheme, "fp16"]
        # Two sets of random weights have nothing in common, but their logits are flat enough to stay below the limit.
        assert host.self_check() == {}
        (answer,) = ask(host, settings, ("POST", "/generate", body))
    assert len(answer.json()["token_ids"]) == 3


@pytest.mark.parametrize("scheme", ["fp16", "int4", ""])
def test_a_scheme_that_is_not_int8_is_refused(float_folder: Path, tmp_path: Path, scheme: str) -> None:
    with pytest.raises(StartupError, match="scheme"), hosted(float_folder, tmp_path, scheme=scheme or "W8A8"):
        pass


def test_alpha_reaches_the_scheme(float_folder: Path, tmp_path: Path) -> None:
    with hosted(float_folder, tmp_path, alpha=0.7, variants="w8a8") as (host, _):
        assert host.info().variants["w8a8"].alpha == 0.7


def test_more_positions_than_the_model_has_are_refused_before_quantizing(float_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="max_model_len 257 exceeds"):
        open_host(Settings(model=str(float_folder), cache_dir=tmp_path, device="cpu", max_model_len=257))
    assert not (tmp_path / "quantized").exists()


def with_added_token(folder: Path, token_id: int) -> None:
    """Add [PAD] to a folder's tokenizer, as a fine-tune does that leaves the embedding as it is."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["model"]["vocab"]["[PAD]"] = token_id
    content["added_tokens"].append({"id": token_id, "content": "[PAD]", "special": True, **flags})
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("token_id", [340, 900])
def test_a_token_that_the_model_has_no_row_for_costs_its_own_request_alone(
    float_folder: Path, tmp_path: Path, token_id: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(float_folder, tmp_path / "model")
    with_added_token(folder, token_id)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, -1, token_id]}))
    bad: Asked = ("POST", "/generate", {"prompt": "hello [PAD]", "max_tokens": 2})
    good: Asked = ("POST", "/generate", {"prompt": "hello", "max_tokens": 2})
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}}}
    chat = {"messages": [{"role": "user", "content": "hello"}], "response_format": wanted, "max_tokens": 4}
    with hosted(folder, tmp_path / "cache", variants="fp16") as (host, settings):
        answers = ask(host, settings, *[bad] * 5, good, ("POST", "/v1/chat/completions", chat))
    assert [answer.status_code for answer in answers] == [400] * 5 + [200] * 2
    assert f"spells '[PAD]', which is token {token_id}" in answers[0].json()["error"]["message"]
    assert answers[-1].json()["choices"][0]["message"]["content"] == "1"
    assert f"knows tokens up to {token_id}" in caplog.text


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", vocab_size=300)
    with (
        pytest.raises(UnsupportedModel, match=r"of ordinary text, but the model's token ids run from 0 to 299"),
        hosted(folder, tmp_path / "cache", variants="fp16"),
    ):
        pass


def test_weights_of_another_shape_are_refused(float_folder: Path, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(source, {"model.embed_tokens.weight": embedding[:-1]})
    for variants in ("w8a8,fp16", "fp16"):
        with (
            pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \[339, 192\], expected \[340, 192\]"),
            hosted(source, tmp_path / "cache", variants=variants),
        ):
            pass
