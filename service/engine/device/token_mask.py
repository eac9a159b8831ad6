"""The tokens that the grammars of a step allow, as bits on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.device.staging import Staging
from service.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The allowed tokens of those C of S sampling rows that have a grammar.

    rows: [C] int64.   bits: [C, W] uint8, bit i % 8 of byte i // 8 for token i; tokens from 8 W on are not allowed.
    """

    rows: Tensor
    bits: Tensor

    @classmethod
    def build(cls, chunks: Sequence[Chunk], staging: Staging) -> TokenMask | None:
        """Collect the masks of the chunks that sample, and launch their copy; None if no chunk has a grammar."""
        matchers = [(row, c.request.matcher) for row, c in enumerate(chunks) if c.request.matcher is not None]
        if not matchers:
            return None
        allowed = [np.frombuffer(matcher.allowed(), dtype=np.uint8) for _, matcher in matchers]
        taken = staging.take(len(matchers) * (8 + len(allowed[0])))
        rows, bits = _split(taken, len(matchers))
        rows.numpy()[:] = [row for row, _ in matchers]
        np.stack(allowed, out=bits.numpy())
        return cls(*_split(staging.send(taken), len(matchers)))

    def apply(self, logits: Tensor) -> Tensor:
        """Replace the logits [S, V] of tokens that are not allowed by -inf; other rows keep their exact values."""
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = (self.bits[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[-1]].bool()
        masked = torch.full_like(logits[self.rows], float("-inf"))
        width = allowed.shape[-1]
        masked[:, :width] = torch.where(allowed, logits[self.rows, :width], masked[:, :width])
        return logits.index_copy(0, self.rows, masked)


def _split(table: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Split uint8 into int64 [num_rows] and uint8 [num_rows, W]."""
    rows, bits = table.tensor_split([8 * num_rows])
    return rows.view(torch.int64), bits.view(num_rows, -1)
