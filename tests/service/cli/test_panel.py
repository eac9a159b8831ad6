"""The start-up panel, bars and lines."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from service.cli import terminal
from service.cli.panel import startup_panel
from service.cli.terminal import Bars, Lines, progress
from service.engine.api import HostInfo, OneToken, VariantInfo
from service.settings import Settings

PATHS = {"/generate": ["post"], "/v1/completions": ["post"], "/health": ["get"], "/ready": ["get"]}


def variant(
    scheme: str, description: str | None, kv_cache_dtype: str, weight_bytes: int, kv_cache_bytes: int
) -> VariantInfo:
    return VariantInfo(
        scheme=scheme,
        description=description,
        alpha=None,
        calibration=None,
        dtype="float16",
        kv_cache_dtype=kv_cache_dtype,
        weight_bytes=weight_bytes,
        kv_cache_bytes=kv_cache_bytes,
        max_num_requests=64,
        checkpoint=None,
        generation=1,
        loaded_at="2024-05-06T00:00:00+00:00",
    )


INFO = HostInfo(
    model="[bold]/models/tiny",
    family="llama",
    max_model_len=2048,
    vocab_size=128256,
    sampling_defaults={},
    device="NVIDIA H100 80GB HBM3",
    gpu_memory_bytes=None,
    versions={"ottava": "1.2.3"},
    one_token=OneToken({}, {}, "A step reads 8 GB instead of 16: at best 1.83 times as fast."),
    variants={
        "w8a8": variant("smoothquant-o3", "int8 weights.", "int8", 8_000_000_000, 2_000_000),
        "fp16": variant("fp16", None, "float16", 16_000_000_000, 4_000_000),
    },
    tensor_parallel=1,
    ranks=[],
)


def shown(width: int = 120, has_keys: bool = False, **settings: Any) -> str:
    drawn = io.StringIO()
    Console(file=drawn, width=width).print(startup_panel(INFO, PATHS, Settings(**settings), has_keys))
    return drawn.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_says_what_is_served_and_where(width: int) -> None:
    text = shown(width)
    assert {len(line) for line in text.splitlines()} == {width}
    said = " ".join(text.replace("│", " ").split())
    for words in (
        "ottava 1.2.3",
        "[bold]/models/tiny (llama), up to 2048 tokens",
        "default; float16, 8,000 MB weights, 2 MB int8 KV cache; smoothquant-o3, int8 weights.",
        "float16, 16,000 MB weights, 4 MB float16 KV cache; float weights and activations",
        "at best 1.83 times as fast",
        "page http://127.0.0.1:8000/",
        "docs http://127.0.0.1:8000/docs",
        "POST http://127.0.0.1:8000/generate /v1/completions",
        "GET /health /ready",
        "chat ottava chat",
        "keys off",
    ):
        assert words in said
    assert "--url" not in said


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({"port": 9000}, "http://127.0.0.1:9000"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:8000"),
        ({"host": "::"}, "http://[::1]:8000"),
        ({"host": "::1", "port": 81}, "http://[::1]:81"),
        ({"port": 0}, "http://127.0.0.1:PORT"),
    ],
)
def test_urls_can_be_called(settings: dict[str, Any], url: str) -> None:
    text = shown(**settings)
    assert f"{url}/generate" in text
    assert ("chosen by the system" in text) == (settings.get("port") == 0)
    assert (f"ottava chat --url {url}" in text) == (not url.endswith(":8000"))


def test_listening_beyond_this_machine_is_warned_of() -> None:
    assert "other machines may reach" not in shown(has_keys=True)
    assert "everybody who gets there is served" in shown(host="0.0.0.0", allow_anonymous=True)
    keyed = " ".join(shown(host="10.0.0.5", has_keys=True).replace("│", " ").split())
    assert "keys on; listening on 10.0.0.5" in keyed
    assert "in the clear unless a proxy adds TLS" in keyed


def test_the_settings_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "o.toml"
    path.write_text("port = 5\n")
    text = shown(config=path)
    assert "o.toml" in text
    assert ":5/generate" in text


def test_lines_say_a_stage_once_and_then_now_and_again() -> None:
    said: list[str] = []
    now_s = 0.0
    lines = Lines(said.append, lambda: now_s)
    for done in range(31):
        lines("quantizing", done, 30, "error 1%")
        now_s += 1.0
    lines("loading", 0, 0)
    lines("loading", 0, 0)
    assert said == [
        "quantizing, error 1%",
        "quantizing: 10 of 30, error 1%",
        "quantizing: 20 of 30, error 1%",
        "quantizing: 30 of 30, error 1%",
        "loading",
    ]


def test_no_terminal_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as on_progress:
        on_progress("loading [w8a8]", 0, 0)
    assert capsys.readouterr().err == "ottava: loading [w8a8]\n"


def test_a_terminal_gets_a_bar_for_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=out, force_terminal=True, width=100))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress() as on_progress:
        assert isinstance(on_progress, Bars)
        on_progress("loading w8a8", 0, 0)
        on_progress("capturing w8a8", 1, 4, "half")
        on_progress("capturing w8a8", 4, 4)
    drawn = out.getvalue()
    assert "loading w8a8" in drawn
    assert "capturing w8a8" in drawn
    assert "100%" in drawn
