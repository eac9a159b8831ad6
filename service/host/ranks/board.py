"""The numbers of steps in memory that the ranks share."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np

from service.engine.step_table import Ints

NUM_SLOTS = 4
"""At most two steps are in flight, and a rank has copied a step's numbers before that step can have ended."""

MAX_RANKS = 16
"""Twice as many as the settings allow."""


class Board:
    """NUM_SLOTS arrays of size int32 in anonymous memory, which a child process inherits by its descriptor.

    Behind them is, for each slot and rank, whether the rank has launched that step late.

    Args:
        size: of a slot, in int32.
        descriptor: of the memory that another process made; None makes some.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self.size = size
        num_bytes = 4 * (size + MAX_RANKS) * NUM_SLOTS
        self.descriptor = os.memfd_create("ottava-steps") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, num_bytes)
        self._memory = mmap.mmap(self.descriptor, num_bytes)
        numbers = np.frombuffer(self._memory, dtype=np.int32)
        self._slots: list[Ints] = [numbers[i * size : (i + 1) * size] for i in range(NUM_SLOTS)]
        self._late = numbers[size * NUM_SLOTS :].reshape(NUM_SLOTS, MAX_RANKS)
        self._last = -1

    def write(self, columns: Sequence[Ints]) -> int:
        """Copy columns into the next slot, one behind the other, and return which it is."""
        self._last = (self._last + 1) % NUM_SLOTS
        np.concatenate(columns, out=self._slots[self._last][: sum(map(len, columns))])
        self._late[self._last] = 0
        return self._last

    def read(self, slot: int) -> Ints:
        """The numbers of a slot and whatever is behind them, valid until NUM_SLOTS - 1 more have been written."""
        return self._slots[slot]

    def note_late(self, slot: int, rank: int) -> None:
        """This rank has launched the slot's step when the one before it had ended."""
        self._late[slot, rank] = 1

    def was_late(self, slot: int) -> bool:
        """Whether a rank has noted that."""
        return bool(self._late[slot].any())
