"""A decoder on processes that sum with the kernels over memory they share, interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import collectives
from kernels.ways import Way
from service.engine.device import ranks as ranks_module
from service.engine.device.ranks import GroupRanks
from service.models.weights import Norm
from tests.support.peer_decoder import SHAPE
from tests.support.peers import local_peers, run_processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")
def test_hidden_states_are_those_of_ranks_that_sum_in_the_plain_way() -> None:
    """Floats and int8, by both ops: with the residual whole, and with each rank's rows of it."""
    width = SHAPE["hidden_size"]
    assert run_processes(2, program="tests.support.peer_decoder", width=width, timeout_s=240) == [0, 0]


@pytest.mark.parametrize(
    ("way", "num_rows", "width", "is_layer_norm", "wanted"),
    [
        ("all_reduce_rms_norm", 8, 64, False, "all_reduce_rms_norm"),
        ("reduce_scatter_rms_norm", 8, 64, False, "plain"),
        ("plain", 8, 64, False, "plain"),
        ("all_reduce_rms_norm", 9, 64, False, "plain"),
        ("all_reduce_rms_norm", 8, 32, False, "plain"),
        ("all_reduce_rms_norm", 8, 64, True, "plain"),
    ],
)
def test_a_kernel_is_used_where_the_table_says_so_and_there_is_memory(
    way: Way, num_rows: int, width: int, is_layer_norm: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is memory for the all-reduce of 8 rows of 64. Else, as for a LayerNorm, sum and norm are apart."""
    ranks, done = GroupRanks.__new__(GroupRanks), list[str]()
    peers: dict[Way, collectives.Peers] = {
        "all_reduce_rms_norm": local_peers(collectives.all_reduce_rms_norm, 2, 8, 64, 4)[0]
    }
    ranks.size, ranks._gpu_name, ranks._peers = 2, "a GPU", {(64, torch.float32): peers}
    monkeypatch.setattr(ranks_module, "choose", lambda *_: way)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda _: done.append("plain"))

    def noted(chosen: Way, _: collectives.Peers, x: Tensor, residual: Tensor | None, norm: Norm) -> object:
        done.append(chosen)
        return norm(x, residual)

    monkeypatch.setattr(ranks_module, "peers_norm", noted)
    norm = Norm(torch.ones(width), torch.zeros(width) if is_layer_norm else None, 1e-5, None)
    ranks.all_reduce_norm(torch.ones(num_rows, width), None, norm)
    assert done == [wanted]
