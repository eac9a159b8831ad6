"""Settings: sources, bounds, and names that do not exist."""

import os
import re
from pathlib import Path
from typing import get_args

import pytest

import service
from service.errors import InvalidSettings
from service.settings import BASELINE, Settings, Variant, load_settings
from service.settings.file import tell_service_links


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
        ({"sink": "yes"}, "sink = 'yes'.*'auto', 'on' or 'off'"),
        ({"sink": "on", "variants": "fp16"}, "sink is 'on' and variants is fp16.*add w8a8 to variants"),
        ({"sink": "on", "random_weights": True}, "sink is 'on' and random_weights is true.*leave sink auto"),
        ({"rotate": True, "variants": "fp16"}, "rotate is true and variants is fp16.*leave rotate off"),
        ({"rotate": True, "random_weights": True}, "rotate is true and random_weights is true"),
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


LINKS = {
    "OTTAVA_SERVICE_HOST": "10.0.0.5",
    "OTTAVA_SERVICE_PORT": "8000",
    "OTTAVA_SERVICE_PORT_HTTP": "8000",
    "OTTAVA_PORT": "tcp://10.0.0.5:8000",
    "OTTAVA_PORT_8000_TCP": "tcp://10.0.0.5:8000",
    "OTTAVA_PORT_8000_TCP_PROTO": "tcp",
    "OTTAVA_PORT_8000_TCP_PORT": "8000",
    "OTTAVA_PORT_8000_TCP_ADDR": "10.0.0.5",
}
OTHER_SERVICE = {name.replace("OTTAVA", "OTTAVA_GATEWAY"): value for name, value in LINKS.items()}


@pytest.mark.parametrize("links", [LINKS, OTHER_SERVICE, {**LINKS, **OTHER_SERVICE}])
def test_links_to_a_kubernetes_service_are_passed_over_in_one_line(
    links: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OTTAVA_HOST", "0.0.0.0")
    settings = load_settings()
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)
    tell_service_links()
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == [str(len(links))]
    assert "links to a Kubernetes service" in caplog.text


def test_without_links_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tell_service_links()
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTTAVA_SERVICE_PROT", "8000", "unknown environment variable OTTAVA_SERVICE_PROT"),
        ("OTTAVA_PORTS", "8000", "the nearest known one is OTTAVA_PORT"),
        ("OTTAVA_PORT_TCP", "8000", "unknown environment variable OTTAVA_PORT_TCP"),
    ],
)
def test_beside_links_a_misspelt_setting_stays_an_error(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for link, target in {**LINKS, name: value}.items():
        monkeypatch.setenv(link, target)
    with pytest.raises(InvalidSettings, match=said):
        load_settings()


def test_a_port_that_is_a_number_stays_a_setting_beside_links(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**LINKS, "OTTAVA_PORT": "9000"}.items():
        monkeypatch.setenv(name, value)
    assert load_settings().port == 9000


def test_a_link_alone_is_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTTAVA_PORT", "tcp://10.0.0.5:8000")
    with pytest.raises(InvalidSettings, match=r"port = 'tcp://10\.0\.0\.5:8000'"):
        load_settings()
