"""Two ranks on two GPUs compute the bits of one rank with activations in groups of half the width."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.gpu_ranks import DTYPE, LENGTHS, decoder_of, hidden_states
from tests.support.grouped_activations import group_activations
from tests.support.thread_ranks import on_ranks
from tests.support.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[3]
SHAPE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 1024}
"""The width for which the package has a table of ways; the vocabulary of tiny models is kept."""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sums", ["plain", "chosen"])
@pytest.mark.parametrize("scheme", ["rtn-token", "fp16"])
def test_processes_compute_what_threads_do(scheme: str, sums: str, tmp_path: Path) -> None:
    """plain: sums by NCCL; chosen: as the table of ways says, on an H200 by our kernels."""
    folder = save_tiny_model(tmp_path / "model", "llama", **SHAPE)
    command = [sys.executable, "-m", "tests.support.gpu_ranks", str(folder), scheme, sums]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=300)
    assert done.returncode == 0
    device = torch.device("cuda", 0)
    wanted = on_ranks(2, lambda ranks: hidden_states(decoder_of(folder, scheme, device, ranks)))[0]
    for rank in range(2):
        found = load_file(folder / f"rank-{rank}.safetensors")
        for length, each in zip(LENGTHS, wanted, strict=True):
            assert torch.equal(found[str(length)], each.cpu()), f"rank {rank}, {length} tokens"
            assert each.float().std() > 0.01


@pytest.mark.gpu
def test_int8_bits_are_those_of_one_rank_with_grouped_activations(tmp_path: Path) -> None:
    folder, device = save_tiny_model(tmp_path / "model", "llama", **SHAPE), torch.device("cuda", 0)
    parts = on_ranks(2, lambda ranks: decoder_of(folder, "rtn-token", device, ranks))
    wanted = on_ranks(2, lambda ranks: hidden_states(decoder_of(folder, "rtn-token", device, ranks)))
    whole = decoder_of(folder, "rtn-token", device)
    group_activations(whole, parts, DTYPE)
    for grouped, *ranks in zip(hidden_states(whole), *wanted, strict=True):
        assert all(torch.equal(grouped, each) for each in ranks)
