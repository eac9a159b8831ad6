"""The table of held-out texts: which cell is whose, with its interval, and the plot of rows that miss nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import held_out
from quant.scheme import PRESETS
from service.settings import load_settings
from tests.support.tiny_models import save_tiny_model

CPU = torch.device("cpu")


def row(scheme: str, text: str, ratio: float, kl: float) -> dict[str, Any]:
    ends = {"ratio_interval": (ratio - 0.01, ratio + 0.02), "kl_interval": (kl / 2, kl * 2)}
    return {"scheme": scheme, "text": text, "ratio": ratio, "kl": kl, **ends}


ROWS = [row("a", "x", 1.01, 0.02), row("a", "y", 1.5, 0.1), row("b", "x", 0.99, 0.001), row("b", "y", 2.0, 0.3)]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    held_out.print_table(ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "| scheme | x: over float | KL, nats | y: over float | KL, nats |",
        "|---|---|---|---|---|",
        "| `a` | +1.00 % (0.0 to 3.0) | 0.0200 (0.0100 to 0.0400) | +50.00 % (49.0 to 52.0) "
        "| 0.1000 (0.0500 to 0.2000) |",
        "| `b` | -1.00 % (-2.0 to 1.0) | 0.0010 (0.0005 to 0.0020) | +100.00 % (99.0 to 102.0) "
        "| 0.3000 (0.1500 to 0.6000) |",
    ]


def test_the_plot(tmp_path: Path) -> None:
    held_out.draw(ROWS, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_for_each_scheme_and_text(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    settings = load_settings(cache_dir=tmp_path, dtype="float32")
    texts = {
        name: torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(n)) for n, name in enumerate("xy")
    }
    schemes = [PRESETS["rtn-token"], PRESETS["rtn-dynamic"]]
    rows = list(held_out.measured(source, schemes, texts, settings, torch.float32, CPU))
    assert [(found["scheme"], found["text"]) for found in rows] == [
        ("rtn-token", "x"),
        ("rtn-token", "y"),
        ("rtn-dynamic", "x"),
        ("rtn-dynamic", "y"),
    ]
    for found in rows:
        assert found["ratio"] == found["perplexity"] / found["float_perplexity"]
        assert 0 < found["kl"] < 1
    assert rows[0]["float_perplexity"] == rows[2]["float_perplexity"] != rows[1]["float_perplexity"]
    assert rows[0]["kl"] < rows[2]["kl"]
