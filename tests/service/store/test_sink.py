"""Which tokens a model's texts begin with in float, by what is wished and what its tokenizer does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from quant.checkpoint.reader import Checkpoint
from quant.scheme import PRESETS
from service.errors import InvalidSettings, ReloadFailed
from service.host.reloader import open_host
from service.host.variants import refuse_other_options
from service.settings import Settings
from service.store.calibration import Calibration
from service.store.quantized import quantize_model
from service.store.sink import behind_sink, with_sink
from tests.support.tiny_models import save_tiny_model
from tests.support.tokenizers import byte_level_backend, save

CPU = torch.device("cpu")


@pytest.fixture
def led(tmp_path: Path) -> Path:
    """A model whose prompts begin with its BOS token, 1."""
    return save_tiny_model(tmp_path / "led")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """One whose prompts begin with no token of their own."""
    backend = byte_level_backend()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return save(save_tiny_model(tmp_path / "plain"), backend)


def test_by_itself_where_tokens_share_scales_and_prompts_begin_with_one_anyway(plain: Path, led: Path) -> None:
    for name, scheme in PRESETS.items():
        shared = name in {"rtn", "rtn-dynamic", "w8a8-static", "smoothquant-o2", "smoothquant-o3"}
        assert bool(with_sink(led, scheme, "auto").sink) == shared, name
        assert with_sink(plain, scheme, "auto") == scheme
        assert with_sink(led, scheme, "off") == scheme


def test_asked_for_it_is_the_first_token_of_prompts_or_the_configs(plain: Path, led: Path) -> None:
    change_config(led, bos_token_id=9)
    assert with_sink(led, PRESETS["w8a8"], "on").sink == (1,)
    assert with_sink(plain, PRESETS["w8a8"], "on").sink == (1,)
    change_config(plain, bos_token_id=None, eos_token_id=[900, 2])
    assert with_sink(plain, PRESETS["w8a8"], "on").sink == (2,)
    change_config(plain, eos_token_id=None)
    with pytest.raises(InvalidSettings, match="neither a bos_token_id nor an eos_token_id"):
        with_sink(plain, PRESETS["w8a8"], "on")
    assert with_sink(plain, PRESETS["fp16"], "on") == PRESETS["fp16"]


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_with_experts_has_none(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "experts", "qwen3_moe")
    assert with_sink(folder, PRESETS["w8a8-static"], "auto") == PRESETS["w8a8-static"]
    with pytest.raises(InvalidSettings, match="which tokens reach an expert"):
        with_sink(folder, PRESETS["w8a8-static"], "on")


def test_windows_are_moved_behind_it() -> None:
    windows = torch.arange(12).view(2, 6)
    assert behind_sink(windows, ()) is windows
    assert behind_sink(windows, (20, 21)).tolist() == [[20, 21, 0, 1, 2, 3], [20, 21, 6, 7, 8, 9]]
    led = behind_sink(windows, (20, 21))
    assert behind_sink(led, (20, 21)) is led


def test_it_is_noted_and_read_again(plain: Path, tmp_path: Path) -> None:
    scheme = with_sink(plain, PRESETS["w8a8-static"].with_alpha(0.5), "on")
    out, calibration = tmp_path / "int8", Calibration(num_windows=2, window_len=32)
    quantize_model(plain, out, scheme, calibration, CPU)
    (read,) = Checkpoint.open(out, torch.float32, CPU).schemes
    assert (read.sink, read.label) == ((1,), "w8a8-static, alpha 0.5, sink")
    assert "the first tokens of every text in float" in read.describe()
    assert "ottava.sink" in (out / "SHA256SUMS").read_text()
    refuse_other_options(out, Settings(sink="on"))
    with pytest.raises(InvalidSettings, match=r"sink is off, but .* was quantized with a sink"):
        refuse_other_options(out, Settings(sink="off"))
    bare = tmp_path / "bare"
    quantize_model(plain, bare, PRESETS["rtn-token"], calibration, CPU)
    with pytest.raises(InvalidSettings, match=r"sink is on, but .* was quantized without a sink"):
        refuse_other_options(bare, Settings(sink="on"))
    with pytest.raises(InvalidSettings, match=r"rotate is true, but .* was quantized without a rotation"):
        refuse_other_options(bare, Settings(rotate=True))


def test_a_served_model_says_so_and_is_not_exchanged_for_one_without(plain: Path, tmp_path: Path) -> None:
    settings = Settings(
        model=str(plain), cache_dir=tmp_path / "cache", scheme="w8a8-static", alpha=0.5, sink="on", device="cpu",
        calibration_windows=2, max_model_len=64, kv_cache_bytes=1 << 20, reload_root=tmp_path,
    )  # fmt: skip
    quantize_model(plain, tmp_path / "bare", PRESETS["rtn-token"], Calibration(), CPU)
    host = open_host(settings)
    try:
        info = host.info()
        assert (info.variants["w8a8"].sink, info.variants["fp16"].sink) == ([1], [])
        assert info.max_model_len == 64
        assert host.reload is not None
        with pytest.raises(ReloadFailed, match=r"quantized with the sink \[\], and the served model with \[1\]"):
            host.reload("bare")
    finally:
        host.stop()
