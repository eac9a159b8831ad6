"""The ranks of `test_collectives` as processes, interpreted, which reach each other's memory and wait."""

from __future__ import annotations

import pytest
import torch

from tests.support.peers import run_processes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_run_ahead_disturb_nobody(size: int) -> None:
    """Both ops, calls of changing sizes, of which the last rank reads each late."""
    assert run_processes(size) == [0] * size


def test_with_one_buffer_they_would(capfd: pytest.CaptureFixture[str]) -> None:
    """The twin: without two buffers in turn a rank that is ahead overwrites what the last one has not read."""
    codes = run_processes(2, "--one-buffer", timeout_s=60)
    assert codes[1] == 1
    assert "rank 1, call" in capfd.readouterr().err


def test_a_rank_waits_for_the_others() -> None:
    assert run_processes(2, absent=1, timeout_s=15) == [None]
