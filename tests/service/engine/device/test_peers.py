"""A decoder on processes that sum with the kernels over memory they share, interpreted."""

from __future__ import annotations

import pytest
import torch

from tests.support.peer_decoder import SHAPE
from tests.support.peers import run_processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")
def test_hidden_states_are_those_of_ranks_that_sum_in_the_plain_way() -> None:
    """Floats and int8, by both ops: with the residual whole, and with each rank's rows of it."""
    width = SHAPE["hidden_size"]
    assert run_processes(2, program="tests.support.peer_decoder", width=width, timeout_s=240) == [0, 0]
