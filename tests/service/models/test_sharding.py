"""A decoder on several ranks computes what it computes on one, and each rank reads its own part alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import Quantized
from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.tensor_file import TensorFile
from quant.errors import CheckpointError
from quant.part import WHOLE, Part
from quant.scheme import PRESETS, Scheme
from service.errors import UnsupportedModel
from service.models.config import ModelConfig
from service.models.decoder import Decoder, score
from service.models.random_weights import random_decoder
from service.models.sharding import Ranks, columns, refuse_uneven, rows, span
from service.models.weights import Norm
from service.store.calibration import Calibration
from service.store.quantized import quantize_model
from tests.support.grouped_activations import group_activations, hidden_of
from tests.support.thread_ranks import ShardingRanks, on_ranks
from tests.support.tiny_models import TINY, make_config, save_tiny_model

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 341}
"""Four heads of 64 over two key heads, and a vocabulary that two ranks cannot share evenly."""

MULTI_HEAD = {"opt", "gpt2", "gpt_neox", "gpt_neox-sequential"}
IDS = torch.tensor([(37 * i * i + 11 * i) % 341 for i in range(70)])


def sizes_of(name: str) -> dict[str, Any]:
    own = SIZES if name not in MULTI_HEAD else {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}
    return own | ({"word_embed_proj_dim": 256} if name == "opt" else {})


def loader(folder: Path, dtype: torch.dtype = torch.float32) -> Callable[[Ranks], Decoder]:
    return lambda ranks: Decoder(ModelConfig.load(folder), Checkpoint.open(folder, dtype, CPU), ranks=ranks)


def scored(folder: Path, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    load = loader(folder, dtype)
    return on_ranks(size, lambda ranks: score(load(ranks), IDS))


@pytest.mark.parametrize("name", TINY)
def test_float_logits_of_every_family(name: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / name, name, **sizes_of(name))
    (whole,), (first, second) = scored(folder, 1), scored(folder, 2)
    assert first.shape == whole.shape == (70, 341)
    assert torch.equal(first, second), "every rank knows all logits"
    assert torch.allclose(first, whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("scheme", "size"),
    [("w8a8", 2), ("w8a8", 4), ("w8a8-static", 2), ("rtn", 2), ("zeroquant", 2), ("llm-int8", 4)],
)
def test_int8_bits_are_those_of_one_rank_with_grouped_activations(
    scheme: str, size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """One rank whose o and down are sums of parts, each with its own scales: groups of K / size inputs."""
    changes = SIZES | {"num_key_value_heads": 4, "intermediate_size": 256}
    folder, text, out = save_tiny_model(tmp_path / "model", "llama", **changes), tmp_path / "text", tmp_path / "int8"
    text.write_text("to be or not to be " * 100)
    quantize_model(folder, out, PRESETS[scheme], Calibration(text, num_windows=2, window_len=64), CPU)
    load = loader(out, dtype)
    decoders = on_ranks(size, load)
    (whole,) = on_ranks(1, load)
    group_activations(whole, decoders, dtype)
    wanted, found = hidden_of(whole, IDS), on_ranks(size, lambda ranks: hidden_of(load(ranks), IDS))
    assert all(torch.equal(wanted, each) for each in found)
    assert wanted.std() > 0.1


@pytest.mark.parametrize("scheme", ["fp16", "rtn-token"])
@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_may_keep_its_rows_of_the_residual_alone(scheme: str, size: int, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", **SIZES | {"num_key_value_heads": 4})

    def go(ranks: Ranks) -> Tensor:
        config = ModelConfig.load(folder)
        return score(random_decoder(config, Scheme.preset(scheme), torch.float32, CPU, seed=3, ranks=ranks), IDS)

    wanted, found = on_ranks(size, go), on_ranks(size, go, ShardingRanks)
    assert all(torch.equal(wanted[0], each) for each in (*wanted, *found))


def test_a_rank_reads_its_part_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "model", "qwen2", **SIZES | {"intermediate_size": 1024})
    num_read, read_into = [0, 0, 0], TensorFile._read_into

    for place, size in enumerate((1, 2, 2)):
        rank = max(0, place - 1)
        ranks = Fixed(rank, size)

        def counted(file: TensorFile, view: memoryview, start: int, place: int = place) -> None:
            num_read[place] += len(view)
            read_into(file, view, start)

        monkeypatch.setattr(TensorFile, "_read_into", counted)
        loader(folder)(ranks)
    whole, first, second = num_read
    assert 0.5 * whole < first < 0.52 * whole
    assert 0.5 * whole < second < 0.52 * whole


class Fixed:
    """A rank that never computes."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def reserve(self, max_rows: int, width: int, dtype: torch.dtype) -> None:
        raise AssertionError(max_rows, width, dtype)

    def all_reduce(self, x: Tensor) -> Tensor:
        raise AssertionError(x)

    def all_reduce_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor | Quantized, Tensor]:
        raise AssertionError(x, residual, norm)

    def all_gather(self, x: Tensor) -> Tensor:
        raise AssertionError(x)

    def broadcast(self, x: Tensor) -> Tensor:
        raise AssertionError(x)


@given(count=st.integers(1, 50), size=st.integers(1, 9))
def test_spans_cover_everything_once(count: int, size: int) -> None:
    spans = [span(count, Fixed(rank, size)) for rank in range(size)]
    assert [index for each in spans for index in each] == list(range(count))


def test_parts() -> None:
    assert rows(Fixed(0, 1), 8, 2) == columns(Fixed(0, 1), 8) == WHOLE
    assert rows(Fixed(1, 2), 8, 2, 2, unit=10) == Part(rows=(range(40, 80), range(90, 100), range(110, 120)))
    assert columns(Fixed(1, 2), 8, 10) == Part(columns=(range(40, 80),), adds=False)
    assert columns(Fixed(0, 2), 8, 10) == Part(columns=(range(40),), adds=True)


@pytest.mark.parametrize(
    ("name", "changes", "size", "complaint"),
    [
        ("llama", {}, 2, r"tensor_parallel 2 does not divide the 3 heads of this llama model; set it to 1"),
        ("llama", SIZES, 4, r"tensor_parallel 4 does not divide the 2 key and value heads .* set it to 2"),
        ("llama", SIZES | {"num_key_value_heads": 4, "intermediate_size": 162}, 4, "162 columns of the MLP .* to 2"),
        ("qwen3_moe", SIZES | {"moe_intermediate_size": 51}, 2, "51 columns of each expert"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(
    name: str, changes: dict[str, Any], size: int, complaint: str
) -> None:
    with pytest.raises(UnsupportedModel, match=complaint):
        refuse_uneven(ModelConfig.of(make_config(name, **changes)), size)


def test_scales_of_groups_that_ranks_would_cut_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", **SIZES | {"intermediate_size": 192})
    out = tmp_path / "int8"
    scheme = Scheme("groups", "group", "token", group_size=64)
    quantize_model(folder, out, scheme, Calibration(), CPU)
    with pytest.raises(
        CheckpointError, match=r"down_proj has scales for groups of 64 inputs, and .* of its 192 inputs"
    ):
        loader(out)(Fixed(0, 2))


@pytest.mark.parametrize("scheme", ["fp16", "w8a8", "zeroquant"])
def test_random_weights_are_parts_of_one_model(scheme: str) -> None:
    config = ModelConfig.of(make_config("llama", **SIZES | {"intermediate_size": 256}))

    def logits(ranks: Ranks) -> Tensor:
        return score(random_decoder(config, PRESETS[scheme], torch.float32, CPU, ranks=ranks), IDS)

    (whole,), (first, _) = on_ranks(1, logits), on_ranks(2, logits)
    assert torch.nn.functional.cosine_similarity(whole.flatten(), first.flatten(), 0) > 0.999
    assert torch.allclose(whole, first, atol=1e-3) == (scheme == "fp16")


def test_a_cache_holds_the_rank_s_heads(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", **SIZES)
    (whole,), (half, _) = on_ranks(1, loader(folder)), on_ranks(2, loader(folder))
    assert half.kv_bytes_per_token * 2 == whole.kv_bytes_per_token
    assert [cache.nbytes * 2 for cache in half.new_caches(3, 16)] == [c.nbytes for c in whole.new_caches(3, 16)]
    assert half.weight_bytes < 0.52 * whole.weight_bytes
