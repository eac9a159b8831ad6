"""Host memory from which the numbers of a step are copied to the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """Two sets of host memory, used in turn: pinned for a GPU, plain for a CPU.

    Allocated once rather than per step, because pinning memory costs more than filling it. A step may call `take` once.
    Two sets are enough because at most two steps are in flight: the step that used this set last has been read before
    the current one could start, so its copy has ended; only the other set's copy may still be running.

    Args:
        device: destination of the copies.
        num_bytes: initial size of a set; it grows on demand.
    """

    def __init__(self, device: torch.device, num_bytes: int = 0) -> None:
        self._device = device
        self._sets = [self._memory(num_bytes) for _ in range(2)]
        self._turn = 0

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 of the next set, with arbitrary content."""
        self._turn ^= 1
        if num_bytes > len(self._sets[self._turn]):
            # Safe during a copy: the allocator keeps pinned memory until the copies from it have ended.
            self._sets[self._turn] = self._memory(1 << (num_bytes - 1).bit_length())
        return self._sets[self._turn][:num_bytes]

    def send(self, taken: Tensor) -> Tensor:
        """Launch the copy to the device and return it there. On a CPU, returns taken, valid until the next but one."""
        return taken if self._device.type == "cpu" else taken.to(self._device, non_blocking=True)

    def _memory(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
