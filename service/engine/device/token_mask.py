"""Which tokens the grammars of a step allow, as bits on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The tokens that C of S sampling rows may yield.

    rows: [C] int64.   bits: [C, W] uint8, bit i % 8 of byte i // 8 for token i; tokens beyond are not allowed.
    """

    rows: Tensor
    bits: Tensor

    @classmethod
    def build(cls, chunks: Sequence[Chunk], device: torch.device) -> TokenMask | None:
        """Ask the grammars of the chunks that sample; None where none has one."""
        matchers = [(row, c.request.matcher) for row, c in enumerate(chunks) if c.request.matcher is not None]
        if not matchers:
            return None
        rows = torch.tensor([row for row, _ in matchers])
        words = torch.frombuffer(bytearray().join(matcher.allowed() for _, matcher in matchers), dtype=torch.uint8)
        bits = words.view(len(matchers), -1)
        if device.type == "cuda":
            rows, bits = (t.pin_memory().to(device, non_blocking=True) for t in (rows, bits))
        return cls(rows, bits)

    def apply(self, logits: Tensor) -> Tensor:
        """logits [S, V] with minus infinity for what is not allowed; rows without a grammar keep their bits."""
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = (self.bits[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[-1]].bool()
        masked = torch.full_like(logits[self.rows], float("-inf"))
        width = allowed.shape[-1]
        masked[:, :width] = torch.where(allowed, logits[self.rows, :width], masked[:, :width])
        return logits.index_copy(0, self.rows, masked)
