"""The sums over ranks on two GPUs: the checks of `benchmarks.collectives`, launched one by one and in a CUDA graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_are_those_of_a_sum_and_a_norm(dtype: str) -> None:
    command = [sys.executable, "-m", "benchmarks.collectives", "--ranks", "2", "--widths", "576,4096"]
    done = subprocess.run([*command, "--rows", "1,17,64,513", "--dtype", dtype], cwd=ROOT, check=False, timeout=600)
    assert done.returncode == 0
