"""Host memory through which the numbers of a step reach the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """Two sets of host memory, used in turn: pinned for a GPU, plain on a CPU.

    Made once and not for each step, since pinning memory costs more than a step's numbers do. A step may take from it
    once. Two sets are enough because at most two steps are in flight: the step that used this set last was read before
    the one now being made could start, so its copy has ended; only the other set's may still be under way.

    Args:
        device: where the numbers go.
        num_bytes: the size of a set at first; one grows when more is asked of it.
    """

    def __init__(self, device: torch.device, num_bytes: int = 0) -> None:
        self._device = device
        self._sets = [self._memory(num_bytes) for _ in range(2)]
        self._turn = 0

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 of the set whose turn it is, whatever it holds."""
        self._turn ^= 1
        if num_bytes > len(self._sets[self._turn]):
            # The allocator keeps pinned memory until the copies from it have ended.
            self._sets[self._turn] = self._memory(1 << (num_bytes - 1).bit_length())
        return self._sets[self._turn][:num_bytes]

    def send(self, taken: Tensor) -> Tensor:
        """What was taken, on its way to the device; on a CPU itself, good until the step after the next."""
        return taken if self._device.type == "cpu" else taken.to(self._device, non_blocking=True)

    def _memory(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
