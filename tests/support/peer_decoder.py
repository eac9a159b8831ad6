"""One of several processes that compute a decoder, which reach each other's memory: RANK SIZE [OPTIONS] DESCRIPTOR...

It fails unless its hidden states are those of ranks in threads, which sum in the plain way.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from kernels import Quantized, Rows, collectives
from kernels.collectives import Peers
from kernels.ways import Way
from quant.scheme import Scheme
from service.engine.device.peers import peers_norm
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.random_weights import random_decoder
from service.models.sharding import Alone, Ranks
from service.models.weights import Norm
from tests.support.peers import MAX_ROWS, mapped_peers
from tests.support.thread_ranks import on_ranks
from tests.support.tiny_models import save_tiny_model

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
CPU = torch.device("cpu")
WAYS: dict[Way, object] = {
    "all_reduce_rms_norm": collectives.all_reduce_rms_norm,
    "reduce_scatter_rms_norm": collectives.reduce_scatter_rms_norm,
}


class PeerRanks(Alone):
    """A rank that sums with a kernel; nothing else is asked of it."""

    def __init__(self, rank: int, size: int, way: Way, peers: Peers) -> None:
        self.rank = rank
        self.size = size
        self._way: Way = way
        self._peers = peers

    def all_reduce(self, x: Tensor) -> Tensor:
        raise AssertionError("every sum of a Llama is left to a norm")

    def all_reduce_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor | Quantized, Tensor]:
        return peers_norm(self._way, self._peers, x, residual, norm)


def hidden(decoder: Decoder, start: int) -> Tensor:
    """Hidden states of a text of MAX_ROWS tokens."""
    steps = torch.arange(MAX_ROWS, dtype=torch.int32)
    table, ends = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, MAX_ROWS], dtype=torch.int32)
    rows = Rows(
        positions=steps, slots=steps, query_starts=ends, context_lens=ends[1:], block_tables=table, is_decode=False
    )
    ids = (steps.long() * 37 + start) % decoder.config.vocab_size
    with torch.inference_mode():
        return decoder(ids, rows, decoder.new_caches(1, 16))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("size", type=int)
    parser.add_argument("descriptors", type=int, nargs="+")
    args = parser.parse_args()
    peers = mapped_peers(args.rank, args.descriptors, SHAPE["hidden_size"])
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.load(save_tiny_model(Path(folder) / "model", "llama", **SHAPE))
    for scheme, tolerance in (("fp16", 1e-5), ("rtn-token", 0.02)):

        def made(ranks: Ranks, scheme: str = scheme) -> Decoder:
            return random_decoder(config, Scheme.preset(scheme), torch.float32, CPU, seed=5, ranks=ranks)

        for way, op in WAYS.items():
            decoder = made(PeerRanks(args.rank, args.size, way, peers[op]))  # type: ignore[index]
            for start in (11, 50):
                wanted = on_ranks(args.size, lambda ranks, start=start: hidden(made(ranks), start))[args.rank]  # type: ignore[misc]
                error = (hidden(decoder, start) - wanted).norm() / wanted.norm()
                # Written so that NaN fails. Codes may differ by one where a norm is summed in another order.
                assert error <= tolerance, f"rank {args.rank}, {scheme}, {way}: {error}"


if __name__ == "__main__":
    main()
