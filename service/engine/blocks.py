"""The pool of KV blocks, which remembers what free blocks hold so that a later prompt may begin with it.

Blocks are found by their content, exactly: a block's key is a number that stands for its tokens and all before them,
found under (key of the block before, its token ids). No two contents share a key, so a hit needs no further check.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

Content = tuple[int | str, bytes]
"""The key of the block before (for the first block, the salt), and the token ids."""


class BlockPool:
    """Shares out the block numbers 0..num_blocks-1.

    A block has as many owners as requests hold it. Free blocks that hold nothing of use are given out first, then the
    least recently used of those whose content is known.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_owners = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        # Free blocks of known content; a dictionary keeps the order in which they were released.
        self._kept: dict[int, None] = {}
        self._found: dict[Content, tuple[int, int]] = {}
        self._content: dict[int, Content] = {}
        self._num_keys = 0

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._kept)

    def allocate(self, count: int) -> list[int]:
        """Take count blocks. The caller must have checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block = next(iter(self._kept))
                del self._kept[block]
                self._forget(block)
            self._num_owners[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give up one ownership of each block and empty the caller's list, so that none can be given up twice."""
        # The last block first: a beginning is of use without its end, but not the reverse.
        for block in reversed(blocks):
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                if block in self._content:
                    self._kept[block] = None
                else:
                    self._blank.append(block)
        blocks.clear()

    def find(self, salt: str, token_ids: Sequence[int], block_size: int) -> list[tuple[int, int]]:
        """(block, key) of the known blocks that token_ids begin with. They stay as they are: see `share`."""
        found: list[tuple[int, int]] = []
        before: int | str = salt
        for start in range(0, len(token_ids) - block_size + 1, block_size):
            known = self._found.get((before, _bytes_of(token_ids[start : start + block_size])))
            if known is None:
                break
            found.append(known)
            before = known[1]
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these blocks are free."""
        return sum(self._num_owners[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each of these blocks, which `find` has just returned."""
        for block in blocks:
            if self._num_owners[block] == 0:
                del self._kept[block]
            self._num_owners[block] += 1

    def remember(self, before: int | str, token_ids: Sequence[int], block: int) -> int:
        """Note that a block in use now holds these tokens, after those of the key before. Returns their key."""
        content = before, _bytes_of(token_ids)
        known = self._found.get(content)
        if known is not None:
            return known[1]
        self._num_keys += 1
        self._found[content] = block, self._num_keys
        self._content[block] = content
        return self._num_keys

    def forget(self, blocks: Sequence[int]) -> None:
        """Find these blocks no more: what they hold cannot be trusted."""
        for block in blocks:
            self._forget(block)
            if block in self._kept:
                del self._kept[block]
                self._blank.append(block)

    def forget_all(self) -> None:
        """Find no block any more that has been used so far."""
        self.forget(list(self._content))

    def check_integrity(self, held: Sequence[int]) -> None:
        """Assert that every block is either free or owned as often as it is held."""
        owners = Counter(held)
        assert all(count == owners[block] for block, count in enumerate(self._num_owners)), "a block's owners differ"
        free = [*self._blank, *self._kept]
        assert sorted(free + list(owners)) == list(range(self.num_blocks)), "a KV block was lost or given out twice"
        assert set(self._kept) <= set(self._content)
        assert {content: block for block, content in self._content.items()} == {
            content: block for content, (block, _) in self._found.items()
        }

    def _forget(self, block: int) -> None:
        content = self._content.pop(block, None)
        if content is not None:
            del self._found[content]


def _bytes_of(token_ids: Sequence[int]) -> bytes:
    """One key of a dictionary instead of many numbers; it is compared whole."""
    return array("q", token_ids).tobytes()
