"""The load of two servers side by side: the points, the ratios, and a checkpoint that really serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.traffic import HIGHER, LOWER, add_ratios, read_point, served_rates, table, write_reading
from service.models.decoder import score
from service.models.loader import load_decoder
from service.text.tokenizer import Tokenizer
from service.tools.bench.prompts import read_dataset


@pytest.mark.parametrize(
    ("point", "read"),
    [
        ("latency", ("latency",)),
        ("latency:16", ("latency", 16)),
        ("rate:28:12", ("rate", 28, 12)),
        ("burst:256", ("burst", 256)),
        ("saturation:20:90:10", ("saturation", 20, 90, 10)),
    ],
)
def test_points(point: str, read: tuple[Any, ...]) -> None:
    assert read_point(point) == read


@pytest.mark.parametrize("point", ["", "rate:28", "rate:28:x", "rate:-1:3", "burst", "latency:3:4", "sweep:1"])
def test_what_is_no_point_is_refused(point: str) -> None:
    with pytest.raises(ValueError, match="no point; use latency"):
        read_point(point)


def test_the_requests_of_a_reading_can_be_sent(tmp_path: Path) -> None:
    write_reading(tmp_path / "lines", 3500, 2, "tiny")
    prompts = read_dataset(tmp_path / "lines", 1)
    assert [len(prompt.ids) for prompt in prompts] == [32] * 16 + [3500] * 2
    assert [prompt.max_tokens for prompt in prompts] == [768] * 16 + [2] * 2


def test_the_highest_rate_is_that_of_the_rows_that_were_served() -> None:
    rows = [{"server": "a", "rate": rate, "is_served": rate < 50} for rate in (40.0, 56.6, 47.6, 51.9)]
    assert served_rates([*rows, {"server": "b", "rate": 40.0, "is_served": False}]) == {"a": 47.6, "b": 0.0}
    assert served_rates([{"server": "a", "point": "latency"}]) == {}


def test_ratios_are_above_one_where_ottava_is_better() -> None:
    def row(server: str, time_ms: float, rate: float) -> dict[str, Any]:
        figures = dict.fromkeys(LOWER, time_ms) | dict.fromkeys(HIGHER, rate)
        return {"server": server, "point": "latency", "completed": 3} | figures

    rows = [row("ottava", 4.0, 300.0), row("peer", 6.0, 200.0), row("ottava", 1.0, 1.0) | {"point": "burst:2"}]
    add_ratios(rows)
    assert {rows[0][f"better_{key}"] for key in (*LOWER, *HIGHER)} == {1.5}
    assert not any(key.startswith("better") for each in rows[1:] for key in each)
    assert [line.split()[:2] for line in table(rows).splitlines()[1:]] == [
        ["latency", "ottava"],
        ["latency", "peer"],
        ["burst:2", "ottava"],
    ]


@pytest.mark.parametrize("is_int8", [True, False])
def test_the_checkpoint_is_served(tmp_path: Path, is_int8: bool) -> None:
    num_bytes = write_checkpoint(tmp_path, "tiny", is_int8=is_int8, max_model_len=512)
    decoder = load_decoder(tmp_path, torch.float32, torch.device("cpu"))
    assert decoder.config.max_model_len == 512
    linears = sum(linear.weight_bytes for layer in decoder.layers for linear in layer.linears)
    assert linears == pytest.approx(num_bytes - decoder.embedding.nbytes / 2, rel=0.02 if is_int8 else 1.02)
    logits = score(decoder, torch.arange(3, 40))
    assert logits.isfinite().all()
    assert logits.std() > 0.01, "no product sees zeros alone"
    assert Tokenizer.from_folder(tmp_path).encode("w5 w17") == [5, 17]
