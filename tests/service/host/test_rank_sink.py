"""Two ranks of a model whose texts begin with a token in float; a process has one group of ranks at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from service.engine.api import SamplingParams
from service.host.reloader import open_host
from service.models.decoder import Decoder, score
from service.models.loader import decoder_of, opened
from service.models.sharding import Ranks
from tests.support.engines import CPU, collect
from tests.support.thread_ranks import on_ranks
from tests.support.tiny_models import save_tiny_model
from tests.support.two_ranks import SHAPE, settings_of


def test_ranks_share_a_model_with_a_sink(tmp_path: Path) -> None:
    """Also for a prompt and answer that fill all blocks, one more with the token that is added."""
    folder = save_tiny_model(tmp_path / "model", "llama", **SHAPE)
    changes = {"random_weights": False, "scheme": "w8a8-static", "alpha": 0.5, "calibration_windows": 2}
    sizes = {"max_model_len": 64, "block_size": 16, "cache_dir": tmp_path}
    host = open_host(settings_of(folder, 2).model_copy(update=changes | sizes))
    try:
        decoder, prompt = host.variants["w8a8"].decoder, [(7 * j) % 250 + 3 for j in range(56)]
        assert (decoder.sink_ids, decoder.max_model_len, decoder.config.max_model_len) == ((1,), 64, 65)
        checkpoint = host.variants["w8a8"].folder
        assert checkpoint is not None
        logits = on_ranks(2, lambda ranks: score(ranked(checkpoint, ranks), torch.tensor(prompt)))[0]
        tokens = asyncio.run(collect(host.engines["w8a8"], prompt, SamplingParams(8, ignore_eos=True)))
    finally:
        host.stop()
    assert len(tokens) == 8
    assert tokens[0].id == int(logits[-1].argmax())


def ranked(folder: Path, ranks: Ranks) -> Decoder:
    config, checkpoint = opened(folder, torch.float32, CPU, 64)
    return decoder_of(config, checkpoint, ranks=ranks)
