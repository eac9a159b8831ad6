"""The ranks of one decoder as processes with a GPU each: what they compute of some texts, into a folder."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from quant.scheme import Scheme
from service.engine.device.ranks import GroupRanks
from service.host.ranks.group import join
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.random_weights import random_decoder
from service.models.sharding import ALONE, Ranks
from tests.support.grouped_activations import hidden_of

DTYPE, SEED = torch.float16, 3
LENGTHS = 1, 40, 200
"""Of the texts; on an H200 a table chooses both kernels for these rows."""


def decoder_of(folder: Path, scheme: str, device: torch.device, ranks: Ranks = ALONE) -> Decoder:
    return random_decoder(ModelConfig.load(folder), Scheme.preset(scheme), DTYPE, device, SEED, ranks=ranks)


def hidden_states(decoder: Decoder) -> list[Tensor]:
    texts = (torch.tensor([(37 * i * i + 11 * i) % 256 for i in range(length)]) for length in LENGTHS)
    return [hidden_of(decoder, text) for text in texts]


def run(rank: int, folder: Path, scheme: str, is_plain: bool, meeting: str) -> None:
    device = torch.device("cuda", rank)
    join(rank, 2, Path(meeting), device)
    ranks = GroupRanks()
    if not is_plain:
        ranks.reserve(max(LENGTHS), ModelConfig.load(folder).hidden_size, DTYPE)
    found = hidden_states(decoder_of(folder, scheme, device, ranks))
    save_file({str(len(each)): each.cpu() for each in found}, folder / f"rank-{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        spawn(run, (Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "plain", place), nprocs=2)  # type: ignore[no-untyped-call]
