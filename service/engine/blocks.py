"""The pool of KV blocks: a stack of free block numbers."""

from __future__ import annotations


class BlockPool:
    """Allocates the block numbers 0..num_blocks-1, each to one request at a time."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take count blocks. The caller must have checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Free the blocks and empty the caller's list, so that no block can be freed twice."""
        self._free.extend(reversed(blocks))
        blocks.clear()

    def check_integrity(self, held: list[int]) -> None:
        """Assert that every block is either free or held by exactly one request."""
        assert sorted(self._free + held) == list(range(self.num_blocks)), "a KV block was lost or given out twice"
